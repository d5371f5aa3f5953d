"""Draws a comparison: quality against the bytes of the cache. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cachefold.evaluation.labels import Mark

MEBI = 1024 * 1024
COLUMNS = 2
"""Panels side by side."""
INK, PAPER = "0.15", "0.75"
MARKERS = "osD^vP*Xhp<>d8"
EXACT = "own dtype"


class Point(NamedTuple):
    """One method in one panel."""

    name: str
    nbytes: float
    value: float
    error: float | None
    policy: str
    codec: str | None
    cr: float | None
    weights: str | None = None
    """What tells one artefact from another of the same policy."""

    @property
    def method(self) -> tuple[str, str | None]:
        """What has a colour of its own: a policy, with the weights that it learned."""
        return self.policy, self.weights


class Panel(NamedTuple):
    """One quality of all methods."""

    title: str
    higher_is_better: bool
    points: list[Point]


def missing() -> str | None:
    """What is needed to draw; None when it is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return "the picture needs matplotlib; run `pip install matplotlib`"
    return None


def pareto(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other one beats in both bytes and quality, by bytes.

    >>> a, b, c = (Point(n, x, y, None, n, None, None) for n, x, y in
    ...            [("a", 1, 0.5), ("b", 2, 0.9), ("c", 4, 0.2)])
    >>> [point.name for point in pareto([c, b, a], higher_is_better=False)]
    ['a', 'c']
    """
    sign = -1.0 if higher_is_better else 1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.nbytes, sign * one.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """What there is to draw: the increase of the loss, then every task."""
    held = [row for row in rows if row.get("cache_bytes")]
    found = [
        Panel("Held-out loss over dense, nats/token", False, [
            _point(row, row["increase"], row.get("increase_error"))
            for row in held if row.get("increase") is not None
        ])
    ]  # fmt: skip
    for task in dict.fromkeys(task for row in held for task in row.get("tasks", {})):
        mine = [row for row in held if task in row.get("tasks", {})]
        first = mine[0]["tasks"][task]
        found.append(
            Panel(f"{task}, {first['metric']}", first["higher_is_better"], [
                _point(row, row["tasks"][task]["value"], row["tasks"][task]["error"])
                for row in mine
            ])
        )  # fmt: skip
    return [panel for panel in found if panel.points]


def _point(row: dict[str, Any], value: float, error: float | None) -> Point:
    return Point(
        row["name"], row["cache_bytes"], value, error, row["policy"], row["codec"],
        row["cr_asked"], row.get("weights"),
    )  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], path: Path, context: int, base: str = "") -> bool:
    """Writes the picture.

    Args:
        rows: of a report.
        path: of the file.
        context: tokens in the cache where bytes were measured.
        base: name of the base model, which labels of its artefacts leave out.

    Returns:
        False where there is nothing to draw.
    """
    found = panels(rows)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from cachefold.evaluation.labels import label

    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7.2 * columns, 4.8 * lines), layout="constrained", squeeze=False
    )
    colours, markers = _styles(found)
    for axis, panel in itertools.zip_longest(axes.flat, found):
        if panel is None:
            axis.set_visible(False)
            continue
        _panel(axis, panel, colours, markers, context)
    figure.canvas.draw()  # fixes the layout, which the labels are placed in
    for axis, panel in zip(axes.flat, found, strict=False):
        label(axis, _marks(panel.points, colours), base)
    _legend(axes.flat[0], markers)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _styles(found: Sequence[Panel]) -> tuple[dict[Any, Any], dict[str | None, str]]:
    """A colour for every method, a marker for every codec."""
    from matplotlib import colormaps

    points = [point for panel in found for point in panel.points]
    methods = list(dict.fromkeys(point.method for point in points))
    codecs = list(dict.fromkeys([None, *(point.codec for point in points)]))
    palette = (*colormaps["tab10"].colors, *colormaps["Dark2"].colors)
    return (
        {method: palette[i % len(palette)] for i, method in enumerate(methods)},
        {codec: MARKERS[i % len(MARKERS)] for i, codec in enumerate(codecs)},
    )


def _panel(
    axis: Any, panel: Panel, colours: dict[Any, Any], markers: dict[str | None, str], context: int
) -> None:
    """Front, points, and the lines that join a family."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    front = pareto(panel.points, panel.higher_is_better)
    axis.plot(
        *_places(front), color=PAPER, lw=7, alpha=0.6, solid_capstyle="round", zorder=1,
        label="Pareto front",
    )  # fmt: skip
    for points in families(panel.points):
        axis.plot(*_places(points), color=colours[points[0].method], lw=1, zorder=2)
    for point in panel.points:
        axis.errorbar(
            *_places([point]), point.error or 0.0, color=colours[point.method],
            marker=markers[point.codec], elinewidth=1, markersize=6, zorder=3,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    _widen(axis, panel.points)
    low, high = axis.get_xlim()
    ticks = [2.0**i for i in range(-20, 24)]
    if high < 8 * low:  # too few of them
        ticks += [1.5 * tick for tick in ticks]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if not panel.higher_is_better:
        _spread(axis, panel.points)
    axis.set(xlabel=f"cache after {context:,} tokens, MiB", title=panel.title)
    axis.grid(color="0.93", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def families(points: Sequence[Point]) -> list[list[Point]]:
    """The points that a line joins, by bytes: one thing at several ratios."""
    found: dict[tuple[str | None, ...], list[Point]] = {}
    for point in sorted(points, key=lambda one: one.nbytes):
        alone = point.codec if point.cr else point.name
        found.setdefault((*point.method, alone), []).append(point)
    return list(found.values())


def _marks(points: Sequence[Point], colours: dict[Any, Any]) -> list[list[Mark]]:
    """Families as what gets labels, a little darker than the points."""
    from cachefold.evaluation.labels import Mark

    return [
        [
            Mark(
                point.name,
                point.nbytes / MEBI,
                point.value,
                [0.75 * c for c in colours[point.method]],
            )
            for point in family
        ]
        for family in families(points)
    ]


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Where points lie."""
    return [point.nbytes / MEBI for point in points], [point.value for point in points]


def _widen(axis: Any, points: Sequence[Point]) -> None:
    """Leaves room for labels on both sides, and at least a factor of two."""
    low, high = (pick(p.nbytes for p in points) / MEBI for pick in (min, max))
    room = max(2.0, high / low) ** 0.14
    axis.set_xlim(low / room, high * room)


def _spread(axis: Any, points: Sequence[Point]) -> None:
    """Very different losses: a logarithmic axis, straight where they are no more than noise."""
    from matplotlib.ticker import FuncFormatter

    sizes = sorted(abs(point.value) for point in points if point.value)
    noise = 2 * statistics.median(point.error or 0.0 for point in points)
    small = max(sizes[0], noise, sizes[-1] / 300) if sizes else 0.0
    if sizes and sizes[-1] > 20 * small:
        straight = 10.0 ** round(math.log10(small))
        axis.set_yscale("symlog", linthresh=straight, linscale=0.7)
        axis.set_ylabel(f"logarithmic above {straight:g}", color="0.4", fontsize=8)
        least = min(point.value - (point.error or 0.0) for point in points)
        axis.set_ylim(min(1.3 * least, -straight / 3), 2 * sizes[-1])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axhline(0, color="0.6", lw=0.8, zorder=2)


def _legend(axis: Any, markers: dict[str | None, str]) -> None:
    """The front, and what the shapes mean; policies are named at their points."""
    from matplotlib.lines import Line2D

    handles = axis.get_legend_handles_labels()[0][:1]
    if len(markers) > 1:
        handles += [
            Line2D([], [], color=INK, marker=marker, ls="", label=codec or EXACT)
            for codec, marker in markers.items()
        ]
    axis.legend(handles=handles, frameon=False, fontsize=8)
