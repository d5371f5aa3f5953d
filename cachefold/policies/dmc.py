"""Dynamic Memory Compression: merge or append, learned (Nawrot et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cachefold.policies.base import register
from cachefold.policies.decisions import LinearDecision, NeuronDecision, share_in_layer
from cachefold.policies.options import (
    check_choice,
    check_cr,
    check_delay,
    check_flag,
    check_index,
    check_kv_heads,
    check_max_cr,
    check_window,
)


@register("dmc")
@dataclass(frozen=True, kw_only=True, slots=True)
class DMC:
    """Dynamic Memory Compression with delayed merging.

    >>> DMC(cr=4).delay
    16
    """

    name: ClassVar[str]

    cr: float = 2.0
    """Target compression ratio, tokens seen / entries kept, ring included; >= 1."""
    delay: int = 16
    """Newest tokens that stay exact before their decision is carried out; 0 = the paper."""
    window: int | None = None
    """Most tokens one entry averages (12 in the paper); None = no bound."""
    decision: str = "linear"
    """Where decisions come from: `linear` (projection of the layer input) or `neuron` (paper)."""
    per: str = "head"
    """`head` = each kv head decides; `layer` = one decision per layer (DMC-C)."""
    neuron: int = -1
    """Channel of q and k that decides, for `neuron`: the released code uses the last."""
    kv_heads: int | None = None
    """kv heads left after mean pooling (GQA), which `cr` does not count; None = all."""
    max_cr: float | None = None
    """Largest ratio of a dial, one model for every ratio from 1 to it; None = `cr` alone."""
    proportional: bool = False
    """Proportional attention: the score of an entry rises by g * log(tokens merged), g learned for
    each head. Costs one number an entry; keeps what was said far back from being drowned out."""

    def __post_init__(self) -> None:
        """Checks values."""
        check_cr(self.cr)
        check_delay(self.delay)
        check_window(self.window)
        check_index("neuron", self.neuron)
        check_choice("decision", self.decision, ("linear", "neuron"))
        check_choice("per", self.per, ("head", "layer"))
        check_kv_heads(self.kv_heads)
        check_max_cr(self.cr, self.max_cr)
        check_flag("proportional", self.proportional)
        if self.max_cr is not None and self.decision == "neuron":
            raise ValueError("a dial (max_cr) needs decision linear; neuron has nothing to move")
        if self.proportional and self.decision == "neuron":
            raise ValueError(
                "proportional needs decision linear, which learns the weights of sizes; got neuron"
            )
        if self.proportional and self.window is not None:
            raise ValueError(
                f"proportional counts all tokens of an entry, so that no window={self.window} can "
                "bound them; leave one of the two out"
            )

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes the decision module of one attention layer.

        Raises:
            ValueError: the neuron is beyond the head dim.
        """
        if self.decision != "neuron":
            return LinearDecision(
                hidden_size, num_kv_heads, dial=self.max_cr is not None,
                proportional=self.proportional,
            )  # fmt: skip
        if not -head_dim <= self.neuron < head_dim:
            raise ValueError(
                f"neuron {self.neuron} doesn't exist: the heads have {head_dim} channels, "
                f"{-head_dim} to {head_dim - 1}; -1 is the last"
            )
        return NeuronDecision(self.neuron)

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Applies `per`: with `layer`, all heads take the mean of both.

        Args:
            logits: (B, K, T) merge logits.
            omega: (B, K, T) importance weights.

        Returns:
            Both, (B, K, T) each.

        >>> import torch
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> DMC(per="layer").share(x, x)[0].flatten().tolist()
        [0.5, 0.5]
        """
        return (logits, omega) if self.per == "head" else share_in_layer(logits, omega)

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}


@register("dmc-c")
@dataclass(frozen=True, kw_only=True, slots=True)
class DMCC(DMC):
    """DMC-C: all heads of a layer share one decision, so that they are of equal length.

    >>> DMCC(cr=4).per
    'layer'
    """

    per: str = "layer"
    """`layer`; free heads are `dmc`."""

    def __post_init__(self) -> None:
        """Checks values."""
        DMC.__post_init__(self)
        if self.per != "layer":
            raise ValueError(f"dmc-c decides per layer; got per={self.per!r}, which is policy dmc")
