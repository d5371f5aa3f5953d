"""Draws a retrofit: its training curve and its compression map. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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
        figure.colorbar(points, ax=curve, label="thousand tokens")
    else:
        _curve(curve, log, tokens)
    image = _heads(heat, load_map(folder))
    heat.set_title(f"Compression map: cr of every head, {config['cr']:.2f} over all")
    ticks = image.norm.vmax ** np.linspace(0, 1, 5)
    figure.colorbar(image, label="cr", ticks=ticks, format="%.1f").minorticks_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def _heads(axes: Axes, rows: list[dict[str, Any]]) -> Any:
    """The compression map, on the scale of its text form: geometric, from 1."""
    ratios = [list(head) for head in zip(*(row["cr"] for row in rows), strict=True)]
    # Where nothing is compressed the scale would have no length.
    scale = LogNorm(vmin=1, vmax=max(1.01, *(cr for head in ratios for cr in head)))
    layers = [row["layer"] for row in rows]
    image = axes.imshow(ratios, aspect="auto", cmap="viridis", norm=scale)
    axes.set(xlabel="layer", ylabel="kv head", yticks=range(len(ratios)))
    shown = range(0, len(layers), 5)
    axes.set_xticks(shown, [str(layers[i]) for i in shown])
    axes.minorticks_off()
    return image


def _dial_curve(axes: Axes, log: list[dict[str, Any]], tokens: list[float]) -> Any:
    """Divergence over the ratio that a step asked for, coloured by when it was."""
    points = axes.scatter(
        [row["target"] for row in log], [row["kd"] for row in log], c=tokens, s=8,
        cmap="viridis_r",
    )  # fmt: skip
    axes.set(xlabel="cr asked for in a step", title="Training of a dial: each step, late ones dark")
    axes.set_ylabel("KL to the original, nats/token")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
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
