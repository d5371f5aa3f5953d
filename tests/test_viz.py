"""Compression maps as text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cachefold.viz import ASCII, BLOCKS, compression_map_blocks, load_map


def test_blocks_rise_with_the_ratio() -> None:
    picture = compression_map_blocks(torch.tensor([[1.0, 2.0], [4.0, 8.0]]), ascii_only=False)
    lines = picture.splitlines()
    assert lines[2] == f"head 0 {BLOCKS[0] * 2}{BLOCKS[5] * 2}"
    assert lines[3] == f"head 1 {BLOCKS[2] * 2}{BLOCKS[7] * 2}"
    assert lines[-1].startswith(f"cr: {BLOCKS[0]} 1.00") and lines[-1].endswith("8.00")


def test_rows_keep_their_layer_and_long_maps_wrap() -> None:
    rows = [{"layer": 2 * i, "cr": [1.0 + i]} for i in range(40)]
    lines = compression_map_blocks(rows, ascii_only=True).splitlines()
    assert lines[1].split() == ["layer", "0", "10", "20", "30", "40", "50", "60"]
    assert lines[3].split() == ["layer", "64", "74"]
    assert lines[2].startswith("head 0 ..") and lines[4].endswith("@@")


def test_a_cache_knows_which_layers_fold() -> None:
    cache = SimpleNamespace(folded_layers=[5, 11], map=lambda: torch.tensor([[1.0], [2.0]]))
    assert compression_map_blocks(cache, ascii_only=True).splitlines()[1:3] == [
        "layer  5", "head 0 ..@@",
    ]  # fmt: skip


def test_nothing_merged() -> None:
    assert compression_map_blocks(torch.ones(2, 2), ascii_only=True).endswith("1.00 everywhere")


def test_plain_characters_where_blocks_can_not_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    picture = compression_map_blocks([[1.0, 3.0]])
    assert picture.isascii() and ASCII[-1] in picture


def test_load_map(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"map": [{"layer": 0, "cr": [1, 2]}]}))
    assert load_map(tmp_path) == load_map(tmp_path / "map.json") == [{"layer": 0, "cr": [1.0, 2.0]}]
    (tmp_path / "map.json").write_text("[]")
    with pytest.raises(ValueError, match="no compression map"):
        load_map(tmp_path)
    with pytest.raises(ValueError, match="no compression map at"):
        load_map(tmp_path / "other.json")
    with pytest.raises(ValueError, match="empty"):
        compression_map_blocks(torch.zeros(0, 0))
