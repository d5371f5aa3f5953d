"""Checks of policy options, told alike by every policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cachefold.core.names import closest


def check_cr(cr: Any) -> None:
    """Refuses anything but a compression ratio.

    Raises:
        ValueError: not a finite number >= 1.

    >>> check_cr(4)
    """
    number = isinstance(cr, float) or is_int(cr)
    if not number or not 1 <= cr < math.inf:
        raise ValueError(
            f"cr is tokens seen / entries kept and must be a finite number >= 1; got {cr!r}"
        )


def check_max_cr(cr: Any, max_cr: Any) -> None:
    """Refuses anything but the largest ratio of a dial, or None.

    Raises:
        ValueError: not a ratio above 1, or below `cr`.

    >>> check_max_cr(2, 8)
    """
    if max_cr is None:
        return
    check_cr(max_cr)
    if max_cr <= 1 or max_cr < cr:
        raise ValueError(
            f"max_cr is the largest ratio a dial is trained for, above 1 and at least cr={cr}, "
            f"the one it serves unless told; got {max_cr!r}. null trains for cr alone"
        )


def check_delay(delay: Any) -> None:
    """Refuses anything but a number of exact tokens.

    Raises:
        ValueError: not a whole number >= 0.

    >>> check_delay(16)
    """
    if not is_int(delay) or delay < 0:
        raise ValueError(f"delay is a whole number of tokens >= 0; got {delay!r}")


def check_flag(name: str, flag: Any) -> None:
    """Refuses anything but True or False.

    Raises:
        ValueError: another value.

    >>> check_flag("proportional", True)
    """
    if not isinstance(flag, bool):
        raise ValueError(f"{name} is true or false; got {flag!r}")


def check_window(window: Any) -> None:
    """Refuses anything but a bound on the tokens of an entry, or None.

    Raises:
        ValueError: not a whole number >= 1.

    >>> check_window(None)
    """
    if window is not None and (not is_int(window) or window < 1):
        raise ValueError(
            f"window is a whole number of tokens >= 1, or null for no bound; got {window!r}"
        )


def check_kv_heads(kv_heads: Any) -> None:
    """Refuses anything but a number of kv heads, or None; the model says which numbers fit.

    Raises:
        ValueError: not a whole number >= 1.

    >>> check_kv_heads(None)
    """
    if kv_heads is not None and (not is_int(kv_heads) or kv_heads < 1):
        raise ValueError(
            f"kv_heads is how many kv heads are left after pooling, a whole number >= 1, or null "
            f"for all; got {kv_heads!r}"
        )


def check_index(name: str, index: Any) -> None:
    """Refuses anything but the index of a channel.

    Raises:
        ValueError: not a whole number.

    >>> check_index("neuron", -1)
    """
    if not is_int(index):
        raise ValueError(f"{name} is the index of a channel, such as -1; got {index!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuses anything but one of the names allowed.

    Raises:
        ValueError: another value, with the closest match.

    >>> check_choice("per", "head", ("head", "layer"))
    """
    if value not in allowed:
        hint = closest(str(value), allowed)
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.{hint}")


def is_int(value: Any) -> bool:
    """Whether it is a whole number; True and False are none.

    >>> is_int(1), is_int(True)
    (True, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)
