"""Random eviction: what any other policy must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cachefold.core.eviction import Held
from cachefold.policies.base import register
from cachefold.policies.budget import BudgetPolicy
from cachefold.policies.options import is_int

_MULTIPLIERS = (0x1CE4E5B9BF58476D, 0x133111EB94D049BB)
"""Odd numbers that spread bits, close to those of splitmix64 (Steele et al., 2014)."""


@register("random")
@dataclass(frozen=True, kw_only=True, slots=True)
class Random(BudgetPolicy):
    """Evicts any entry with the same chance, in each head on its own; no training.

    Draws depend on seed, layer, head and positions alone: the same in any batch and for any
    number of tokens at once.

    >>> Random(cr=2).seed
    0
    """

    name: ClassVar[str]

    seed: int = 0
    """Other seeds draw other entries."""

    def __post_init__(self) -> None:
        """Checks values."""
        BudgetPolicy.__post_init__(self)
        if not is_int(self.seed) or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is a whole number from 0 to {2**31 - 1}; got {self.seed!r}")

    def rank(self, held: Held) -> Tensor:
        """A new draw for every entry at every query; see `Evictor.rank`."""
        head = torch.arange(held.position.shape[1], device=held.position.device)[:, None]
        place = _spread(_spread(head + (self.seed << 32)) + held.layer)
        return _unit(_spread(_spread(place + held.newest.long()) + held.position))


def _spread(bits: Tensor) -> Tensor:
    """Mixes int64 so that a change in any bit changes about half of them."""
    for factor in _MULTIPLIERS:
        bits = (bits ^ (bits >> 31)) * factor
    return bits ^ (bits >> 29)


def _unit(bits: Tensor) -> Tensor:
    """int64 to [0, 1), float32: the upper 24 bits."""
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24
