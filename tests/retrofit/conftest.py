"""Shared workspace of the retrofit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.retrofit.tiny import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny model and text."""
    folder = tmp_path_factory.mktemp("retrofit")
    make_workspace(folder)
    return folder
