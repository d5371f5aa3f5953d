"""Compression maps as text: one block per layer and head."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = ".:-=+*#@"
MAP = "map.json"
_BAND = 32
"""Layers side by side; deeper models take several bands."""


def load_map(path: str | Path) -> list[dict[str, Any]]:
    """Reads the map a retrofit wrote.

    Args:
        path: `map.json`, or the folder that holds it.

    Returns:
        For each folded layer its index `layer` and the `cr` of every head.

    Raises:
        ValueError: no such file, or not a map.
    """
    path = Path(path)
    path = path / MAP if path.is_dir() else path
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["map"]
        return [{"layer": int(row["layer"]), "cr": [float(x) for x in row["cr"]]} for row in rows]
    except OSError as error:
        raise ValueError(f"no compression map at {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no compression map: {error}") from error


def compression_map_blocks(source: Any, *, ascii_only: bool | None = None) -> str:
    """Draws layers across and heads down; higher and fuller blocks compress more.

    Args:
        source: rows with `layer` and `cr` as `load_map` gives them, a FoldedCache, or a table of
            ratios (layers, heads), whose layers are then counted from 0.
        ascii_only: draw with plain characters; None = when stdout can't show blocks.

    Returns:
        Lines of text, the last one the scale (geometric, from 1).

    Raises:
        ValueError: nothing to draw.

    >>> print(compression_map_blocks([[1.0, 4.0], [2.0, 1.0]], ascii_only=True))
    compression map: layers across, heads down
    layer  0
    head 0 ..++
    head 1 @@..
    cr: . 1.00  : 1.22  - 1.49  = 1.81  + 2.21  * 2.69  # 3.28  @ 4.00
    """
    layers, ratios = _rows(source)
    ramp = ASCII if (ascii_only if ascii_only is not None else not _shows_blocks()) else BLOCKS
    top = max(1.0, *(ratio for row in ratios for ratio in row))
    lines = ["compression map: layers across, heads down"]
    for start in range(0, len(layers), _BAND):
        band = ratios[start : start + _BAND]
        lines.append("layer  " + _ruler(layers[start : start + _BAND]))
        for head in range(max(len(row) for row in band)):
            cells = (_cell(row[head], top, ramp) * 2 if head < len(row) else "  " for row in band)
            lines.append(f"head {head:<2}".ljust(7)[:7] + "".join(cells))
    if top < 1.005:
        return "\n".join([*lines, f"cr: {ramp[0]} 1.00 everywhere"])
    steps = len(ramp) - 1
    scale = (f"{block} {top ** (i / steps):.2f}" for i, block in enumerate(ramp))
    return "\n".join([*lines, "cr: " + "  ".join(scale)])


def _rows(source: Any) -> tuple[list[int], list[list[float]]]:
    if hasattr(source, "folded_layers"):  # a cache, which knows what does not fold
        ratios = zip(source.folded_layers, source.map().tolist(), strict=True)
        source = [{"layer": layer, "cr": heads} for layer, heads in ratios]
    rows: Sequence[Any] = source.tolist() if hasattr(source, "tolist") else list(source)
    if not rows or not all(len(row["cr"] if isinstance(row, dict) else row) for row in rows):
        raise ValueError("the compression map is empty: no layer is folded")
    if isinstance(rows[0], dict):
        return [row["layer"] for row in rows], [row["cr"] for row in rows]
    return list(range(len(rows))), [list(row) for row in rows]


def _cell(ratio: float, top: float, ramp: str) -> str:
    if top < 1.005 or ratio <= 1:
        return ramp[0]
    return ramp[round(math.log(ratio) / math.log(top) * (len(ramp) - 1))]


def _ruler(layers: list[int]) -> str:
    """The index of every fifth layer above its cell, two characters a cell."""
    line = ""
    for i in range(0, len(layers), 5):
        line = line.ljust(2 * i) + str(layers[i])
    return line


def _shows_blocks() -> bool:
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True
