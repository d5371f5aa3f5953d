"""Grouped-query attention from a trained model: kv heads mean-pooled (Ainslie et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from cachefold.policies.base import register
from cachefold.policies.full import Full
from cachefold.policies.options import check_kv_heads


@register("gqa")
@dataclass(frozen=True, kw_only=True, slots=True)
class GQA(Full):
    """Keeps every token, in fewer kv heads; the model is up-trained to it (a retrofit).

    Pooling composes with merging and eviction: `DMC(cr=2, kv_heads=1)`.

    >>> GQA(kv_heads=1).cr
    1.0
    """

    kv_heads: int = 1
    """kv heads that are left, a divisor of those of the model; 1 = multi-query attention."""

    def __post_init__(self) -> None:
        """Checks values."""
        if self.kv_heads is None:
            raise ValueError("gqa needs kv_heads, such as 1; to keep all of them use policy full")
        check_kv_heads(self.kv_heads)
