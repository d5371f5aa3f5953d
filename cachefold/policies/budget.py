"""What the training-free policies are, and how many entries a head may keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cachefold.core.eviction import Held
from cachefold.policies.options import check_cr, is_int


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetPolicy(ABC):
    """A method that learns nothing and evicts entries; an `Evictor`, made known by `register`.

    The entries it keeps are a fixed number, or one that grows with the text; exactly one of both.

    >>> from cachefold.policies.tova import TOVA
    >>> TOVA(cr=4).allowed(torch.tensor([1, 4, 5])).tolist()
    [1, 1, 2]
    """

    name: ClassVar[str]
    """The name it is registered under."""
    attentive: ClassVar[bool] = False
    cumulative: ClassVar[bool] = False

    budget: int | None = None
    """Entries that each head keeps; None where `cr` is set."""
    cr: float | None = None
    """Compression ratio: a head keeps ceil(tokens seen / cr) entries; None where `budget` is."""

    def __post_init__(self) -> None:
        """Checks values."""
        if (self.budget is None) == (self.cr is None):
            got = "neither" if self.budget is None else f"budget={self.budget} and cr={self.cr}"
            raise ValueError(
                f"{self.name} needs one of budget (entries per head, such as budget=512) and cr "
                f"(tokens seen / entries kept, such as cr=2); got {got}"
            )
        if self.cr is not None:
            check_cr(self.cr)
        elif self.budget is None or not is_int(self.budget) or self.budget < self.minimum:
            raise ValueError(
                f"budget is a whole number of entries per head, for {self.name} at least "
                f"{self.minimum}; got {self.budget!r}"
            )

    @property
    def minimum(self) -> int:
        """Fewest entries that the policy can do with; with `cr`, short texts keep so many."""
        return 1

    def allowed(self, seen: Tensor) -> Tensor:
        """Entries that each head may keep after `seen` tokens, int64; see `Evictor.allowed`."""
        if self.budget is not None:
            return torch.full_like(seen, self.budget)
        assert self.cr is not None
        return torch.ceil(seen.double() / self.cr).long().clamp(min=self.minimum)

    def score(self, score: Tensor | None, weights: Tensor) -> Tensor:
        """See `Evictor.score`; an `attentive` policy has one of its own."""
        raise AssertionError(f"{self.name} reads no attention")

    @abstractmethod
    def rank(self, held: Held) -> Tensor:
        """Who goes first; see `Evictor.rank`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}
