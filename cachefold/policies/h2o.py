"""H2O: keeps heavy hitters and the newest tokens (Zhang et al., NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cachefold.core.eviction import Held
from cachefold.policies.base import register
from cachefold.policies.budget import BudgetPolicy


@register("h2o")
@dataclass(frozen=True, kw_only=True, slots=True)
class H2O(BudgetPolicy):
    """Heavy-hitter oracle: evicts what received least attention in all; no training.

    A kv head sums the weights of its query heads over all queries since the entry came.

    >>> H2O(budget=512).recent
    0.5
    """

    name: ClassVar[str]
    attentive: ClassVar[bool] = True
    cumulative: ClassVar[bool] = True

    recent: float = 0.5
    """Share of the entries that are the newest and never evicted, above 0 and below 1."""

    def __post_init__(self) -> None:
        """Checks values."""
        BudgetPolicy.__post_init__(self)
        if not _is_share(self.recent):
            raise ValueError(
                "recent is the share of entries that are the newest, above 0 and below 1, such as "
                f"0.5; got {self.recent!r}"
            )

    @property
    def minimum(self) -> int:
        """One heavy hitter and the newest token."""
        return 2

    def score(self, score: Tensor | None, weights: Tensor) -> Tensor:
        """Adds the sum over the query heads of a group; see `Evictor.score`."""
        assert score is not None
        return score + weights.sum(2)

    def rank(self, held: Held) -> Tensor:
        """The score; the newest entries stay; see `Evictor.rank`."""
        assert held.score is not None
        recent = (held.allowed.double() * self.recent).int().clamp(min=1)
        recent = torch.minimum(recent, held.allowed.int() - 1)
        return held.score.masked_fill(held.position > held.newest - recent, torch.inf)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1
