"""Dynamic Memory Compression: merge or append, learned (Nawrot et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachefold.policies.base import closest, register

NEURON_OFFSET = 5.0
"""c of the paper: at the start sigmoid(-c) = 0.0067 merges, sigmoid(c) = 0.9933 weighs."""
OMEGA_EPS = torch.finfo(torch.bfloat16).eps
LINEAR_SCALE = 10.0
"""Factor on the projection, so that a small learning rate moves decisions fast."""
LINEAR_ALPHA_BIAS = -4.0


class LinearDecision(nn.Module):
    """A zero-initialised projection of the layer input; a fresh model never merges.

    Rows 0..K-1 give the merge logits, rows K..2K-1 the importance logits.
    """

    def __init__(self, hidden_size: int, num_kv_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * num_kv_heads, hidden_size))
        bias = torch.zeros(2 * num_kv_heads)
        bias[:num_kv_heads] = LINEAR_ALPHA_BIAS / LINEAR_SCALE
        self.bias = nn.Parameter(bias)

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, zero_out: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decides.

        Args:
            query: (B, H, T, D) before rotary embedding; returned as it is.
            key: (B, K, T, D) before rotary embedding; returned as it is.
            hidden_states: (B, T, E), input of the attention layer.
            zero_out: has no effect here.

        Returns:
            query, key, merge logits (B, K, T) and omega (B, K, T), both float32.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = hidden_states.float() * LINEAR_SCALE
            logits = nn.functional.linear(states, self.weight, self.bias * LINEAR_SCALE)
        merge, importance = logits.transpose(1, 2).chunk(2, dim=1)
        return query, key, merge, torch.sigmoid(importance).clamp(min=OMEGA_EPS)


class NeuronDecision(nn.Module):
    """The paper: one channel of k decides, one channel of q weighs; both leave attention."""

    def __init__(self, neuron: int) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, zero_out: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decides; see `LinearDecision.forward`. `zero_out` is the factor left on the channel."""
        num_kv_heads = key.shape[1]
        merge = key[..., self.neuron].float() - NEURON_OFFSET
        channel = query[..., self.neuron].float().unflatten(1, (num_kv_heads, -1)).mean(2)
        omega = torch.sigmoid(channel + NEURON_OFFSET) + OMEGA_EPS
        scale = torch.ones(key.shape[-1], dtype=key.dtype, device=key.device)
        scale[self.neuron] = zero_out
        return query * scale, key * scale, merge, omega.clamp(max=1.0)


@register("dmc")
@dataclass(frozen=True, kw_only=True, slots=True)
class DMC:
    """Dynamic Memory Compression with delayed merging.

    >>> DMC(cr=4).delay
    16
    """

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

    def __post_init__(self) -> None:
        """Checks values."""
        if not self.cr >= 1:
            raise ValueError(f"cr is tokens seen / entries kept and must be >= 1, got {self.cr}")
        if self.delay < 0:
            raise ValueError(f"delay is a number of tokens and must be >= 0, got {self.delay}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be >= 1 token, or null for no bound; got {self.window}")
        for name, allowed in (("decision", ["linear", "neuron"]), ("per", ["head", "layer"])):
            value = getattr(self, name)
            if value not in allowed:
                hint = closest(str(value), allowed)
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
                )

    def build_decision(self, hidden_size: int, num_kv_heads: int) -> nn.Module:
        """Makes the decision module of one attention layer."""
        if self.decision == "neuron":
            return NeuronDecision(self.neuron)
        return LinearDecision(hidden_size, num_kv_heads)

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Applies `per`: with `layer`, all heads (B, K, T) take the mean of both."""
        if self.per == "head":
            return logits, omega
        return (
            logits.mean(1, keepdim=True).expand_as(logits),
            omega.mean(1, keepdim=True).expand_as(omega),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": "dmc", **asdict(self)}
