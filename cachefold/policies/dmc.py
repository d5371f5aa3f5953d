"""Dynamic Memory Compression: merge or append, learned (Nawrot et al., ICML 2024)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cachefold.core.names import closest
from cachefold.policies.base import register

NEURON_OFFSET = 5.0
"""c of the paper: at the start sigmoid(-c) = 0.0067 merges, sigmoid(c) = 0.9933 weighs."""
OMEGA_EPS = torch.finfo(torch.bfloat16).eps
LINEAR_SCALE = 10.0
"""Factor on the projection, so that a small learning rate moves decisions fast."""
LINEAR_ALPHA_BIAS = -4.0


class LinearDecision(nn.Module):
    """A zero-initialised projection of the layer input; a fresh model never merges.

    Rows 0..K-1 give the merge logits, rows K..2K-1 the importance logits.

    >>> logits, omega = LinearDecision(4, 1)(
    ...     torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 4))
    >>> round(logits.item(), 4), omega.item()
    (-4.0, 0.5)
    """

    neuron = None

    def __init__(self, hidden_size: int, num_kv_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * num_kv_heads, hidden_size))
        bias = torch.zeros(2 * num_kv_heads)
        bias[:num_kv_heads] = LINEAR_ALPHA_BIAS / LINEAR_SCALE
        self.bias = nn.Parameter(bias)

    def forward(self, query: Tensor, key: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`. Omega is in [eps, 1]."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self._decide(hidden_states)
        return self._decide(hidden_states)  # entering a context costs more than the projection

    def _decide(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float())
        merge, importance = (logits * LINEAR_SCALE).transpose(1, 2).chunk(2, dim=1)
        return merge, torch.sigmoid(importance).clamp(min=OMEGA_EPS)


class NeuronDecision(nn.Module):
    """The paper: one channel of k decides, one channel of q weighs; both leave attention."""

    def __init__(self, neuron: int) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, query: Tensor, key: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`. Omega is in (eps, 1 + eps), as in the paper."""
        merge = key[..., self.neuron].float() - NEURON_OFFSET
        channel = query[..., self.neuron].float().unflatten(1, (key.shape[1], -1)).mean(2)
        return merge, torch.sigmoid(channel + NEURON_OFFSET) + OMEGA_EPS


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

    def __post_init__(self) -> None:
        """Checks values."""
        if not _is_number(self.cr) or not 1 <= self.cr < math.inf:
            raise ValueError(
                "cr is tokens seen / entries kept and must be a finite number >= 1; got "
                f"{self.cr!r}"
            )
        if not _is_int(self.delay) or self.delay < 0:
            raise ValueError(f"delay is a whole number of tokens >= 0; got {self.delay!r}")
        if self.window is not None and (not _is_int(self.window) or self.window < 1):
            raise ValueError(
                f"window is a whole number of tokens >= 1, or null for no bound; got "
                f"{self.window!r}"
            )
        if not _is_int(self.neuron):
            raise ValueError(f"neuron is the index of a channel, such as -1; got {self.neuron!r}")
        for name, allowed in (("decision", ["linear", "neuron"]), ("per", ["head", "layer"])):
            value = getattr(self, name)
            if value not in allowed:
                hint = closest(str(value), allowed)
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
                )

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes the decision module of one attention layer.

        Raises:
            ValueError: the neuron is beyond the head dim.
        """
        if self.decision != "neuron":
            return LinearDecision(hidden_size, num_kv_heads)
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

        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> DMC(per="layer").share(x, x)[0].flatten().tolist()
        [0.5, 0.5]
        """
        if self.per == "head":
            return logits, omega
        return (
            logits.mean(1, keepdim=True).expand_as(logits),
            omega.mean(1, keepdim=True).expand_as(omega),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        return {"name": self.name, **asdict(self)}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)
