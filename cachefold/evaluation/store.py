"""A folder of results that is resumed by the same settings and refused to others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cachefold.evaluation.report import replace
from cachefold.policies import get_policy

_NO_LONGER_COUNTS = "batch_size"
"""Older results have it among their settings, but it is about memory."""


def claim(path: Path, facts: dict[str, Any], what: str) -> None:
    """Writes what results belong to, or finds the same there.

    Args:
        path: of a JSON file; its folder is made.
        facts: JSON values.
        what: for the message, such as `results`.

    Raises:
        ValueError: other facts are there; says which differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     claim(Path(folder) / "settings.json", {"limit": 1}, "results")
    ...     claim(Path(folder) / "settings.json", {"limit": 1}, "results")
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(facts, indent=1) + "\n")
        return
    refuse_other(f"{path.parent} has {what}", _read(path), facts)


def refuse_other(what: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses results of other settings.

    Args:
        what: where they are and what they are, for the message.
        there: what they depend on, as it was read from JSON.
        here: what is asked for now, JSON values.

    Raises:
        ValueError: both differ; says in what.

    >>> refuse_other("x has results", {"limit": 1}, {"limit": 1})
    """
    here = json.loads(json.dumps(here))
    differing = [
        f"{name} {there.get(name)!r} there, {here.get(name)!r} now"
        for name in sorted({*there, *here} - {_NO_LONGER_COUNTS})
        if _complete(name, there.get(name)) != _complete(name, here.get(name))
    ]
    if differing:
        raise ValueError(
            f"{what} of other settings ({'; '.join(differing)}): use the same ones, or another "
            "folder"
        )


def _complete(name: str, value: Any) -> Any:
    """A policy with the options it has gained since, at their defaults; all else as it is."""
    if name != "policy" or not isinstance(value, dict):
        return value
    try:
        return json.loads(json.dumps(get_policy(**value).to_dict()))
    except ValueError:  # of a version that knew other ones
        return value


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads a finished result, or measures it and keeps it.

    Raises:
        ValueError: the file is damaged.
    """
    if path.exists():
        return _read(path)
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(found, indent=1) + "\n")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged; delete it to measure it again")
    return found
