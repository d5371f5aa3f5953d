"""Whether a folder can be written to, asked before anything slow is done for it."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(folder: Path, name: str = "--out", advice: str = "give another folder") -> None:
    """Finds out whether files can be written into a folder, which may be missing; makes nothing.

    Args:
        folder: where to.
        name: what a user knows it by.
        advice: what to do where it can't be.

    Raises:
        ValueError: it is no folder, can't be made, or can't be written to.

    >>> check_writable(Path(__file__) / "results")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: --out ...results can't be a folder, as ...writable.py is a file; give another folder
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{name} {folder} can't be a folder, as {there} is a file; {advice}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {folder}: no right to write in {there}; {advice}")
