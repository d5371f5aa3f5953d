"""Draws a retrofit: its training curve and its compression map. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachefold.models.hub import read_config
from cachefold.retrofit.reporting import read_log
from cachefold.viz import load_map

SMOOTHING = 8
"""Log lines that one point of the curve averages."""


def draw(folder: Path, out: Path) -> None:
    """Writes the picture of an artefact.

    Args:
        folder: of the artefact, with the log and the map of its retrofit.
        out: file to write, such as a PNG.

    Raises:
        ValueError: config, log or map is missing or broken.
    """
    log = read_log(folder)
    config = read_config(folder)
    thousands = config["tokens"] / 1000 / log[-1]["step"]
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    curve, heat = figure.subplots(1, 2)
    tokens = [row["step"] * thousands for row in log]
    if config["policy"].get("max_cr"):
        points = _dial_curve(curve, log, tokens)
        figure.colorbar(points, ax=curve, label="cr asked")
    else:
        _curve(curve, log, tokens)
    rows = load_map(folder)
    image = heat.imshow(
        [list(head) for head in zip(*(row["cr"] for row in rows), strict=True)],
        aspect="auto", cmap="viridis", vmin=1,
    )  # fmt: skip
    heat.set(xlabel="folded layer", ylabel="kv head", title="Compression map: cr of every head")
    heat.set_yticks(range(len(rows[0]["cr"])))
    figure.colorbar(image, label="cr")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _dial_curve(axes: Axes, log: list[dict[str, Any]], tokens: list[float]) -> Any:
    """Divergence over thousands of tokens, coloured by the ratio that a step asked for."""
    points = axes.scatter(
        tokens, [row["kd"] for row in log], c=[row["target"] for row in log], s=6, cmap="plasma"
    )
    axes.set(xlabel="thousand tokens", title="Retrofit of a dial: KL at the ratio of each step")
    axes.set_ylabel("KL to the original, nats/token")
    axes.set_yscale("log")
    return points


def _curve(axes: Axes, log: list[dict[str, Any]], tokens: list[float]) -> None:
    """Ratio and divergence over thousands of tokens."""
    divergence = axes.twinx()
    axes.plot(tokens, _smooth([row["cr"] for row in log]), color="tab:blue")
    axes.plot(tokens, [row["target"] for row in log], color="tab:blue", ls=":", lw=1)
    axes.set(xlabel="thousand tokens", title="Retrofit: ratio asked (dotted) and reached, KL")
    axes.set_ylabel("cr, tokens / entries", color="tab:blue")
    divergence.plot(tokens, _smooth([row["kd"] for row in log]), color="tab:red", lw=1)
    divergence.set_ylabel("KL to the original, nats/token", color="tab:red")
    divergence.set_ylim(bottom=0)


def _smooth(values: list[float]) -> list[float]:
    """Trailing means over SMOOTHING values."""
    spans = (values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]
