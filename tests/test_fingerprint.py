"""Weights of a folder, told from other ones."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from cachefold import fingerprint as module
from cachefold.fingerprint import fingerprint


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 100)
    first = fingerprint(tmp_path)
    assert first is not None and len(first) == 16 and fingerprint(tmp_path) == first
    path.write_bytes(b"a" * 50 + b"b" + b"a" * 49)  # of the same size
    assert fingerprint(tmp_path) != first
    path.write_bytes(b"a" * 100)
    assert fingerprint(tmp_path) == first
    (tmp_path / "second.safetensors").write_bytes(b"c")
    assert fingerprint(tmp_path) != first


def test_only_weights_that_are_read_count(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    old = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"new")
    new = fingerprint(tmp_path)
    assert None not in (old, new) and old != new
    for name in ("training_args.bin", "config.json"):
        (tmp_path / name).write_bytes(b"{}")
    assert fingerprint(tmp_path) == new


@pytest.mark.parametrize("place", [0, 5000, 9_999])
def test_of_a_large_file_pieces_are_read(tmp_path: Path, monkeypatch, place: int) -> None:
    monkeypatch.setattr(module, "WHOLE", 1000)
    monkeypatch.setattr(module, "PIECES", 11)
    monkeypatch.setattr(module, "PIECE", 20)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(10_000))
    first = fingerprint(tmp_path)
    tensor = 1 + 9_999 // 10  # as long as pieces are apart
    start = min(place, 10_000 - tensor)
    path.write_bytes(bytes(start) + b"x" * tensor + bytes(10_000 - tensor - start))
    assert fingerprint(tmp_path) != first
    path.write_bytes(bytes(10_001))
    assert fingerprint(tmp_path) != first


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint(tmp_path) is None


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
