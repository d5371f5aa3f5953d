"""TOVA: keeps what the last query attends to (Oren et al., EMNLP 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cachefold.core.eviction import Held
from cachefold.policies.base import register
from cachefold.policies.budget import BudgetPolicy


@register("tova")
@dataclass(frozen=True, kw_only=True, slots=True)
class TOVA(BudgetPolicy):
    """Token omission via attention: evicts what the last query attends to least; no training.

    The weights of the query are averaged over all heads of a layer, which all keep the same
    tokens. Nothing is protected, not even the newest token.

    >>> TOVA(budget=512).budget
    512
    """

    name: ClassVar[str]
    attentive: ClassVar[bool] = True

    def score(self, score: Tensor | None, weights: Tensor) -> Tensor:
        """The mean over the heads of the layer; see `Evictor.score`."""
        mean = weights.mean((1, 2))
        return mean[:, None].expand(-1, weights.shape[1], -1)

    def rank(self, held: Held) -> Tensor:
        """The score; see `Evictor.rank`."""
        assert held.score is not None
        return held.score
