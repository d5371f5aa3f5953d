"""Draws an artefact: its training curve and its compression map.

    python tools/plot_retrofit.py artefacts/smollm2-135m-cr2 docs/smollm2-135m-cr2.png

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from cachefold.viz import load_map

SMOOTHING = 8
"""Log lines that one point of the curve averages."""


def smooth(values: list[float]) -> list[float]:
    """Trailing means over SMOOTHING values."""
    spans = (values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def main(folder: Path, out: Path) -> None:
    """Writes the picture."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    trained = json.loads((folder / "cachefold.json").read_text())["tokens"]
    tokens = [trained / 1000 * row["step"] / log[-1]["step"] for row in log]
    figure, (curve, heat) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    curve.plot(tokens, smooth([row["cr"] for row in log]), color="tab:blue")
    curve.plot(tokens, [row["target"] for row in log], color="tab:blue", ls=":", lw=1)
    curve.set(xlabel="thousand tokens", title="Retrofit: ratio asked (dotted) and reached, KL")
    curve.set_ylabel("cr, tokens / entries", color="tab:blue")
    divergence = curve.twinx()
    divergence.plot(tokens, smooth([row["kd"] for row in log]), color="tab:red", lw=1)
    divergence.set_ylabel("KL to the original, nats/token", color="tab:red")
    divergence.set_ylim(bottom=0)
    rows = load_map(folder)
    image = heat.imshow(
        [list(head) for head in zip(*(row["cr"] for row in rows), strict=True)],
        aspect="auto", cmap="viridis", vmin=1,
    )  # fmt: skip
    heat.set(xlabel="layer", ylabel="kv head", title="Compression map: cr of every head")
    heat.set_yticks(range(len(rows[0]["cr"])))
    figure.colorbar(image, label="cr")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
