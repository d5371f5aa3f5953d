"""StreamingLLM: keeps the first tokens and the newest (Xiao et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cachefold.core.eviction import Held
from cachefold.policies.base import register
from cachefold.policies.budget import BudgetPolicy
from cachefold.policies.options import is_int


@register("streaming")
@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming(BudgetPolicy):
    """StreamingLLM: attention sinks and a sliding window; no training.

    Keys keep the positions they came with; the paper numbers them within the cache, which lets a
    text run beyond the length a model was trained for.

    >>> Streaming(budget=512).sinks
    4
    """

    name: ClassVar[str]

    sinks: int = 4
    """First tokens of a text that are never evicted."""

    def __post_init__(self) -> None:
        """Checks values."""
        if not is_int(self.sinks) or self.sinks < 0:
            raise ValueError(f"sinks is a whole number of tokens >= 0; got {self.sinks!r}")
        BudgetPolicy.__post_init__(self)

    @property
    def minimum(self) -> int:
        """The sinks and the newest token."""
        return self.sinks + 1

    def rank(self, held: Held) -> Tensor:
        """The position; sinks stay; see `Evictor.rank`."""
        return held.position.float().masked_fill(held.position < self.sinks, torch.inf)
