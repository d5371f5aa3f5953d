"""Dynamic Memory Sparsification: learned delayed eviction (Lancucki et al., NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cachefold.policies.base import register
from cachefold.policies.decisions import LinearDecision, share_in_layer
from cachefold.policies.options import (
    check_choice,
    check_cr,
    check_delay,
    check_kv_heads,
    check_max_cr,
)


@register("dms")
@dataclass(frozen=True, kw_only=True, slots=True)
class DMS:
    """Dynamic Memory Sparsification: evict or keep, learned; evicted after a delay.

    The decision of a token says whether it takes the place of the one before it. That is merging
    where an entry averages one token: the parallel form, cache and kernels are those of DMC.

    >>> DMS(cr=4).window
    1
    """

    name: ClassVar[str]
    window: ClassVar[int] = 1
    decision: ClassVar[str] = "linear"
    neuron: ClassVar[int] = -1

    cr: float = 2.0
    """Target compression ratio, tokens seen / entries kept, delayed ones included; >= 1."""
    delay: int = 16
    """Tokens between a decision and the eviction (256 in the paper; 16 trains stably)."""
    per: str = "head"
    """`head` = each kv head decides; `layer` = one decision per layer."""
    kv_heads: int | None = None
    """kv heads left after mean pooling (GQA), which `cr` does not count; None = all."""
    max_cr: float | None = None
    """Largest ratio of a dial, one model for every ratio from 1 to it; None = `cr` alone."""

    def __post_init__(self) -> None:
        """Checks values."""
        check_cr(self.cr)
        check_delay(self.delay)
        check_choice("per", self.per, ("head", "layer"))
        check_kv_heads(self.kv_heads)
        check_max_cr(self.cr, self.max_cr)

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes the decision module of one attention layer; there is nothing to weigh."""
        dial = self.max_cr is not None
        return LinearDecision(hidden_size, num_kv_heads, weighs=False, dial=dial)

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Applies `per`; see `DMC.share`."""
        return (logits, omega) if self.per == "head" else share_in_layer(logits, omega)

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}
