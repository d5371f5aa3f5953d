"""The whole cache: every token stays an entry; what codecs and pooled heads are measured by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cachefold.policies.base import register
from cachefold.policies.decisions import KeepDecision


@register("full")
@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """Keeps every token: only how entries are stored (the codec) compresses.

    >>> Full().cr
    1.0
    """

    name: ClassVar[str]
    cr: ClassVar[float] = 1.0
    delay: ClassVar[int] = 0
    window: ClassVar[int | None] = None
    decision: ClassVar[str] = "none"
    per: ClassVar[str] = "head"
    neuron: ClassVar[int] = -1
    kv_heads: ClassVar[int | None] = None
    max_cr: ClassVar[float | None] = None

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes a module without parameters that never merges."""
        return KeepDecision()

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to share."""
        return logits, omega

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}
