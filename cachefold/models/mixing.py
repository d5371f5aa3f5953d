"""Class swap: puts a mixin before the class of one object and takes it away again."""

from __future__ import annotations

import functools
from typing import Any


def mix_in(target: Any, mixin: Any) -> None:
    """Makes `target` an instance of a class Folded<its class> with `mixin` first.

    >>> class Loud:
    ...     def word(self):
    ...         return super().word().upper()
    >>> class Dog:
    ...     def word(self):
    ...         return "wow"
    >>> dog = Dog()
    >>> mix_in(dog, Loud)
    >>> dog.word(), type(dog).__name__, isinstance(dog, Dog)
    ('WOW', 'FoldedDog', True)
    >>> mix_out(dog)
    >>> dog.word()
    'wow'
    """
    base: Any = type(target)
    target.__class__ = _mixed(mixin, base)


def mix_out(target: Any) -> None:
    """Undoes `mix_in`."""
    target.__class__ = type(target).__bases__[1]


@functools.cache
def _mixed(mixin: Any, base: Any) -> Any:
    return type("Folded" + base.__name__, (mixin, base), {"__module__": mixin.__module__})
