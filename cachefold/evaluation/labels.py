"""Names beside the points of a picture: short, close to their own point, hiding little."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Offset = tuple[float, float, str]
"""Points (1/72 inch) to the right and up, and which side of the text is there."""
Boxes = np.ndarray[Any, np.dtype[np.float64]]
"""(N, 4): left, lower, right and upper edge, in pixels."""
SIDES = {"left": 0.0, "center": 0.5, "right": 1.0}
"""Share of a text that lies left of its place, by its alignment."""
LINE_PARTS = 24
"""Of a line between two points, that labels keep off."""
LEADER = 14.0
"""Points from a point to its label, beyond which a thin line joins them."""
CLEAR = 6.0
"""Pixels that a label should be nearer to its own point than to any other."""
ASTRAY = 400.0
"""Cost of a label that is not, in hidden square pixels."""
UNREADABLE = 6.0
"""Cost of a square pixel that lies on another label or outside the panel."""


class Mark(NamedTuple):
    """A point that gets a label."""

    name: str
    x: float
    y: float
    colour: Sequence[float]
    """RGB."""


def texts(names: Sequence[str], base: str) -> list[str]:
    """Labels of points on a line: the first has its whole name, the others what is different.

    Args:
        names: of the points.
        base: name of the base model, which is left out.

    >>> texts(["m-dial-cr8+int4", "m-dial-cr4+int4"], "m")
    ['dial-cr8+int4', 'cr4']
    >>> texts(["full+int8"], "m")
    ['full+int8']
    """
    short = [name.removeprefix(f"{base}-") for name in names]
    shared = len(os.path.commonprefix(short).rpartition("-")[0]) + 1
    # A codec is told by the marker and by the first name.
    return [short[0], *(name[shared:].partition("+")[0] for name in short[1:])]


def label(axis: Any, lines: Sequence[Sequence[Mark]], base: str) -> None:
    """Writes a label for every point, at the place around it that hides least.

    Args:
        axis: drawn, with its layout fixed.
        lines: points that a line joins, in its order.
        base: name of the base model, which labels leave out.
    """
    frame = np.array([axis.get_window_extent().extents])
    spots = [axis.transData.transform([(mark.x, mark.y) for mark in line]) for line in lines]
    everywhere = np.concatenate(spots)
    marked = np.concatenate([_occupied(line) for line in spots])
    written = np.empty((0, 4))
    for line, own in zip(lines, spots, strict=True):
        names = texts([mark.name for mark in line], base)
        for mark, spot, name in zip(line, own, names, strict=True):
            size = _size(axis, name)
            costs = {}
            for offset in _offsets():
                box = _box(axis, spot, size, offset)
                unreadable = _shared(box, written) + size[0] * size[1] - _shared(box, frame)
                others = everywhere[(everywhere != spot).any(1)]
                astray = _gap(box, others) < _gap(box, spot[None]) + CLEAR
                costs[offset] = math.hypot(*offset[:2]) + ASTRAY * astray
                costs[offset] += _shared(box, marked) + UNREADABLE * unreadable
            best = min(costs, key=costs.__getitem__)
            _write(axis, mark, name, best)
            written = np.concatenate([written, [_box(axis, spot, size, best)]])


def _write(axis: Any, mark: Mark, name: str, offset: Offset) -> None:
    """A label, with a line to its point where that is far."""
    dx, dy, side = offset
    line = {
        "arrowstyle": "-", "color": mark.colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 3,
        "relpos": (SIDES[side], 0.5),
    }  # fmt: skip
    axis.annotate(
        name, (mark.x, mark.y), (dx, dy), textcoords="offset points", ha=side, va="center",
        fontsize=8, color=mark.colour, zorder=4,
        arrowprops=line if math.hypot(dx, dy) > LEADER else None,
    )  # fmt: skip


def _size(axis: Any, name: str) -> tuple[float, float]:
    """Width and height of a label, in pixels."""
    text = axis.annotate(name, (0.5, 0.5), xycoords="axes fraction", fontsize=8)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


def _box(axis: Any, spot: Boxes, size: tuple[float, float], offset: Offset) -> Boxes:
    """(4,) edges of a label beside a spot (2,)."""
    pixels = axis.figure.dpi / 72
    left = spot[0] + offset[0] * pixels - SIDES[offset[2]] * size[0]
    lower = spot[1] + offset[1] * pixels - size[1] / 2
    return np.array([left, lower, left + size[0], lower + size[1]])


def _occupied(spots: Boxes) -> Boxes:
    """Boxes of points (N, 2) and of the line that joins them."""
    between = [
        start + part / LINE_PARTS * (end - start)
        for start, end in itertools.pairwise(spots)
        for part in range(1, LINE_PARTS)
    ]
    points = np.concatenate([spots - 6, spots + 6], axis=1)
    line = np.reshape(between, (-1, 2))
    return np.concatenate([points, np.concatenate([line - (3, 2), line + (3, 2)], axis=1)])


def _offsets() -> list[Offset]:
    """Where a label may be, nearest first."""
    beside = [(8.0, 0.0, "left"), (-8.0, 0.0, "right")]
    around = [
        (dx, sign * dy, side)
        for dy in (9.0, 17.0, 25.0, 34.0)
        for sign in (1, -1)
        for dx, side in ((0.0, "center"), (6.0, "left"), (-6.0, "right"), (22.0, "left"),
                         (-22.0, "right"))
    ]  # fmt: skip
    return [*beside, *around]


def _gap(box: Boxes, spots: Boxes) -> float:
    """Pixels from a box (4,) to the nearest of points (N, 2); infinite if there is none."""
    away = np.maximum(np.maximum(box[:2] - spots, spots - box[2:]), 0)
    return float(np.hypot(*away.T).min(initial=math.inf))


def _shared(box: Boxes, others: Boxes) -> float:
    """Square pixels of a box (4,) that lie on others (N, 4)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.maximum(sides, 0).prod(1).sum())
