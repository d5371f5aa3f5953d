"""What variants there are, and how they take the place of functions of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias
from unittest.mock import patch

from torch import Tensor

from cachefold.models.attention import FoldedAttention

PREFIX = "variant="
Variant: TypeAlias = Callable[[], AbstractContextManager[None]]
VARIANTS: dict[str, Variant] = {}


def split(changes: Sequence[str]) -> tuple[list[str], str | None]:
    """Parts the changes of an ablation into overrides of the recipe and the name of a variant.

    Raises:
        ValueError: no such variant.

    >>> split(["train.lora_rank=4", "variant=frozen"])
    (['train.lora_rank=4'], 'frozen')
    """
    overrides = [change for change in changes if not change.startswith(PREFIX)]
    names = [change.removeprefix(PREFIX) for change in changes if change.startswith(PREFIX)]
    if len(names) > 1 or not set(names) <= set(VARIANTS):
        raise ValueError(f"one of {', '.join(VARIANTS)} can be a variant; got {names}")
    return overrides, names[0] if names else None


def variant(make: Variant) -> Variant:
    """Adds a variant under its name, with dashes."""
    VARIANTS[make.__name__.replace("_", "-")] = make
    return make


@contextmanager
def swapped(*swaps: tuple[Any, str, Any]) -> Iterator[None]:
    """Puts (module or class, name, new function) in place until the block ends."""
    with ExitStack() as stack:
        for owner, name, new in swaps:
            stack.enter_context(patch.object(owner, name, new))
        yield


def of_whole_texts(decide: Callable[..., Tensor]) -> tuple[Any, str, Any]:
    """Swap of `_alpha` for whole texts, all that ablations.py has: caches know no variants."""

    def alpha(self: Any, *args: Any) -> Tensor:
        if args[-1] is None:
            raise ValueError("this variant reads whole texts, can't go on with a cache")
        return decide(self, *args)

    return FoldedAttention, "_alpha", alpha
