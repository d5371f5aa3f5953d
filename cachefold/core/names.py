"""Names a user mistyped: the nearest allowed one. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, allowed: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the nearest allowed name, or nothing.

    >>> closest("tovaa", ["dmc", "tova"])
    " Did you mean 'tova'?"
    >>> closest("zzz", ["dmc", "tova"])
    ''
    """
    match = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
