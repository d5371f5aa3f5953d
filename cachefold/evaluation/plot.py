"""Draws a comparison: quality against the bytes of the cache. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEBI = 1024 * 1024
COLUMNS = 2
"""Panels side by side."""
INK, PAPER = "0.15", "0.75"
MARKERS = "osD^vP*Xhp<>d8"
EXACT = "own dtype"
LINE_PARTS = 24
"""Of a line between two points, that labels keep off."""


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
    def family(self) -> tuple[str | None, ...]:
        """Points of one family are joined: one thing at several ratios, or in several codecs."""
        return self.policy, self.weights, None if self.cr is None else self.codec


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


def draw(rows: Sequence[dict[str, Any]], path: Path, context: int) -> bool:
    """Writes the picture.

    Args:
        rows: of a report.
        path: of the file.
        context: tokens in the cache where bytes were measured.

    Returns:
        False where there is nothing to draw.
    """
    found = panels(rows)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
        _label(axis, panel, colours)
    _legend(axes.flat[0], markers)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _styles(found: Sequence[Panel]) -> tuple[dict[str, Any], dict[str | None, str]]:
    """A colour for every policy, a marker for every codec."""
    from matplotlib import colormaps

    points = [point for panel in found for point in panel.points]
    policies = list(dict.fromkeys(point.policy for point in points))
    codecs = list(dict.fromkeys([None, *(point.codec for point in points)]))
    palette = colormaps["tab10"].colors
    return (
        {policy: palette[i % len(palette)] for i, policy in enumerate(policies)},
        {codec: MARKERS[i % len(MARKERS)] for i, codec in enumerate(codecs)},
    )


def _panel(
    axis: Any, panel: Panel, colours: dict[str, Any], markers: dict[str | None, str], context: int
) -> None:
    """Front, points, and the lines that join a family."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    front = pareto(panel.points, panel.higher_is_better)
    axis.plot(
        *_places(front), color=PAPER, lw=7, alpha=0.6, solid_capstyle="round", zorder=1,
        label="Pareto front",
    )  # fmt: skip
    for points in _families(panel.points):
        axis.plot(*_places(points), color=colours[points[0].policy], lw=1, zorder=2)
    for point in panel.points:
        axis.errorbar(
            *_places([point]), point.error or 0.0, color=colours[point.policy],
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


def _families(points: Sequence[Point]) -> list[list[Point]]:
    """The points that a line joins, by bytes."""
    found: dict[tuple[str | None, ...], list[Point]] = {}
    for point in sorted(points, key=lambda one: one.nbytes):
        found.setdefault(point.family, []).append(point)
    return list(found.values())


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
        least = min(point.value - (point.error or 0.0) for point in points)
        axis.set_ylim(min(1.3 * least, -straight / 3), 2 * sizes[-1])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.axhline(0, color="0.6", lw=0.8, zorder=2)


def _label(axis: Any, panel: Panel, colours: dict[str, Any]) -> None:
    """Writes every name beside its point, at the place around it that hides least."""
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()
    taken = []
    for points in _families(panel.points):
        spots = axis.transData.transform(list(zip(*_places(points), strict=True)))
        taken += [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
        for (x, y), (to_x, to_y) in itertools.pairwise(spots):
            steps = (part / LINE_PARTS for part in range(1, LINE_PARTS))
            between = ((x + s * (to_x - x), y + s * (to_y - y)) for s in steps)
            taken += [Bbox.from_extents(x - 3, y - 2, x + 3, y + 2) for x, y in between]
    for point in panel.points:
        best, least = None, float("inf")
        for dx, dy, side in _offsets():
            text = axis.annotate(
                point.name, (point.nbytes / MEBI, point.value), (dx, dy),
                textcoords="offset points", ha=side, va="center", fontsize=8,
                color=[0.75 * part for part in colours[point.policy]], zorder=4,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            cost = _hidden(box, taken, axis.get_window_extent(renderer)) + 0.3 * abs(dy)
            if cost < least:
                if best is not None:
                    best[0].remove()
                best, least = (text, box), cost
            else:
                text.remove()
        assert best is not None, "there is always a place"
        taken.append(best[1])


def _offsets() -> list[tuple[float, float, str]]:
    """Offsets in points, nearest first, and which side of the text is at the point."""
    beside = [(8.0, 0.0, "left"), (-8.0, 0.0, "right")]
    around = [
        (dx, sign * dy, side)
        for dy in (9.0, 17.0, 25.0)
        for sign in (1, -1)
        for dx, side in ((0.0, "center"), (6.0, "left"), (-6.0, "right"))
    ]
    return [*beside, *around]


def _hidden(box: Any, taken: Sequence[Any], frame: Any) -> float:
    """Square pixels of a label that lie on other things, or outside the panel."""
    from matplotlib.transforms import Bbox

    shared = (Bbox.intersection(box, other) for other in taken)
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    return 4 * outside + sum(one.width * one.height for one in shared if one is not None)


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
