"""Draws a report: what compression gains, one panel for each kind of rows. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PANELS = {
    "attention": ("speedup_dense", "Attention call: times faster than at cr 1"),
    "generate": ("speedup_dense", "Decode: tokens/s over dense transformers"),
    "prefill": ("speedup_dense", "Prefill: times faster than dense"),
}
"""What is drawn over cr, and the title."""
FORMATS = (".png", ".pdf", ".svg")


def check_matplotlib(path: Path) -> None:
    """Refuses a picture that can't be drawn.

    Raises:
        ValueError: matplotlib is missing, or another format.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot takes a file that ends in {', '.join(FORMATS)}; got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; run `pip install matplotlib`, or leave it out")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture; nothing where no row has a ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [kind for kind in PANELS if any(row["kind"] == kind for row in rows)]
    if not kinds:
        return
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.2 * len(kinds), 3.6), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        column, title = PANELS[kind]
        _panel(axis, [row for row in rows if row["kind"] == kind], column, title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], column: str, title: str) -> None:
    places = sorted({(row["batch"], row["context"]) for row in rows})
    for batch, context in places:
        mine = [row for row in rows if (row["batch"], row["context"]) == (batch, context)]
        points = sorted((row["cr"], row[column]) for row in mine)
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{batch} x {context}")
    ratios = sorted({row["cr"] for row in rows})
    axis.axhline(1, color="0.7", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.set(xlabel="imposed cr, tokens / entries", title=title)
    axis.set_ylim(bottom=0)
    axis.legend(title="batch x context")
