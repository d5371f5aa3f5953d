"""Folders that can't be written to."""

from __future__ import annotations

import doctest
import os
from pathlib import Path

import pytest

from cachefold import writable as module
from cachefold.writable import check_writable


def test_a_folder_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[object] = []
    monkeypatch.setattr("os.access", lambda *asked: bool(refused.append(asked)))  # root has all
    with pytest.raises(ValueError, match=f"no right to write in {tmp_path}; give another folder"):
        check_writable(tmp_path / "a/b")
    assert refused == [(tmp_path, os.W_OK | os.X_OK)]
    with pytest.raises(ValueError, match=f"^output_dir {tmp_path}/a: .*; choose another$"):
        check_writable(tmp_path / "a", "output_dir", "choose another")


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/a/b"):
        with pytest.raises(ValueError, match=f"{folder} can't be a folder, as .*/file is a file"):
            check_writable(folder)


def test_a_folder_that_can_be_made_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(tmp_path / "a/b")
    check_writable(Path("relative/folder"))
    assert not list(tmp_path.iterdir())


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
