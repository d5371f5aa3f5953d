"""Grouped-query attention from a trained model: kv heads mean-pooled (Ainslie et al. 2023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cachefold.policies.base import register
from cachefold.policies.decisions import KeepDecision
from cachefold.policies.options import check_kv_heads


@register("gqa")
@dataclass(frozen=True, kw_only=True, slots=True)
class GQA:
    """Keeps every token, in fewer kv heads; the model is up-trained to it (a retrofit).

    Pooling composes with merging and eviction: `DMC(cr=2, kv_heads=1)`.

    >>> GQA(kv_heads=1).cr
    1.0
    """

    name: ClassVar[str]
    cr: ClassVar[float] = 1.0
    delay: ClassVar[int] = 0
    window: ClassVar[int | None] = None
    decision: ClassVar[str] = "none"
    per: ClassVar[str] = "head"
    neuron: ClassVar[int] = -1

    kv_heads: int | None = 1
    """kv heads that are left, a divisor of those of the model; 1 = multi-query attention."""

    def __post_init__(self) -> None:
        """Checks values."""
        check_kv_heads(self.kv_heads)
        if self.kv_heads is None:
            raise ValueError("gqa needs kv_heads, such as 1; to keep all of them use policy full")

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes a module without parameters that never merges."""
        return KeepDecision()

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to share."""
        return logits, omega

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}
