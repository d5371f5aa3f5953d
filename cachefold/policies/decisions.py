"""Modules that decide for the tokens of one attention layer; see `policies.base.Decision`.

Legend: B batch, H query heads, K kv heads, T tokens, D head dim, E hidden size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from cachefold.core.dial import NEVER

NEURON_OFFSET = 5.0
"""c of the paper: at the start sigmoid(-c) = 0.0067 merges, sigmoid(c) = 0.9933 weighs."""
OMEGA_EPS = torch.finfo(torch.bfloat16).eps
LINEAR_SCALE = 10.0
"""Factor on the projection, so that a small learning rate moves decisions fast."""
LINEAR_ALPHA_BIAS = -4.0
DIAL_SLOPE = 7.0
"""Merge logits per position of the dial before training: trained logits are spread over tens."""
SPARED = 1.6
"""Positions by which heads that are spared stay behind for each that the dial is short of its end:
of a dial to 8 they keep nearly all tokens up to a ratio of 4."""


class LinearDecision(nn.Module):
    """A zero-initialised projection of the layer input; a fresh model never merges.

    Rows 0..K-1 give the merge logits, rows K..2K-1 the importance logits.

    Args:
        hidden_size: of the layer input.
        num_kv_heads: K.
        weighs: whether there are importance logits; without, omega is 1.
        dial: whether merge logits move with the position of a dial, each head by a learned slope.
        proportional: whether entries score by their size, each head with a learned weight; 1 at
            first, as in Token Merging.

    >>> logits, omega = LinearDecision(4, 1)(
    ...     torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 4))
    >>> round(logits.item(), 4), omega.item()
    (-4.0, 0.5)
    """

    neuron = None

    def __init__(
        self,
        hidden_size: int,
        num_kv_heads: int,
        weighs: bool = True,
        dial: bool = False,
        proportional: bool = False,
    ) -> None:
        super().__init__()
        rows = 2 * num_kv_heads if weighs else num_kv_heads
        self.weight = nn.Parameter(torch.zeros(rows, hidden_size))
        bias = torch.zeros(rows)
        bias[:num_kv_heads] = LINEAR_ALPHA_BIAS / LINEAR_SCALE
        self.bias = nn.Parameter(bias)
        slope = torch.full((num_kv_heads,), DIAL_SLOPE / LINEAR_SCALE)
        self.slope = nn.Parameter(slope) if dial else None
        growth = torch.full((num_kv_heads,), 1 / LINEAR_SCALE)
        self.growth = nn.Parameter(growth) if proportional else None
        self.weighs = weighs

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return len(self.bias) // 2 if self.weighs else len(self.bias)

    def spare(self, head: int, end: float | None = None) -> None:
        """Makes a head merge later than it does, and holds its merge decisions there.

        With a dial it stays behind by `SPARED` positions for each that the dial is short of `end`,
        where it has caught up: heads that keep all tokens at the largest ratio would be half of
        the cache. Beyond `end` it is ahead of the others. Without a dial it stays behind by a fixed
        number of logits. Training leaves it alone from then on. Else it takes it back: what the
        head is there for is rare in most text, and all heads are pressed alike to merge.

        Args:
            head: kv head.
            end: position of the largest ratio of the dial; None without one.

        >>> decision = LinearDecision(4, 2)
        >>> decision.spare(1)
        >>> decision(None, None, torch.ones(1, 1, 4))[0].flatten().round().tolist()
        [-4.0, -15.0]
        >>> decision = LinearDecision(4, 2, dial=True)
        >>> decision.spare(1, end=2.0)
        >>> for position in (0.0, 1.0, 2.0):
        ...     logits, _ = decision(None, None, torch.ones(1, 1, 4), position)
        ...     print(logits.flatten().round().tolist())
        [-4.0, -26.0]
        [3.0, -8.0]
        [10.0, 10.0]
        """
        with torch.no_grad():
            if self.slope is None or end is None:
                assert self.slope is None and end is None, "a dial, and only that, has an end"
                self.bias[head] -= SPARED * DIAL_SLOPE / LINEAR_SCALE
            else:
                lag = SPARED * self.slope[head].abs()
                self.bias[head] -= lag * end
                self.slope[head] += lag
        for parameter in (self.weight, self.bias, self.slope):
            if parameter is not None:
                parameter.register_hook(functools.partial(_without_row, head))

    def settle(self, position: float) -> None:
        """Takes the dial away; merge logits stay as they are at a position.

        >>> decision = LinearDecision(4, 1, dial=True)
        >>> decision.settle(2.0)
        >>> decision(None, None, torch.ones(1, 1, 4))[0].flatten().round().tolist()
        [10.0]
        """
        assert self.slope is not None
        with torch.no_grad():
            self.bias[: self.num_kv_heads] += self.slope * position
        self.slope = None

    @property
    def size_weight(self) -> Tensor | None:
        """(K,) float32; see `policies.base.Decision`."""
        return None if self.growth is None else self.growth.float() * LINEAR_SCALE

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`. Omega is in [eps, 1]."""
        if torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self._decide(hidden_states, position)
        # Entering a context costs more than the projection.
        return self._decide(hidden_states, position)

    def _decide(self, hidden_states: Tensor, position: float) -> tuple[Tensor, Tensor]:
        batch, count, size = hidden_states.shape
        rows, weight = hidden_states.reshape(-1, size).float(), self.weight.float()
        # Scaled in the same call: decoding feels the price of every operation.
        logits = torch.addmm(
            self.bias.float(), rows, weight.t(), beta=LINEAR_SCALE, alpha=LINEAR_SCALE
        )
        logits = logits.view(batch, count, -1).transpose(1, 2)
        if not self.weighs:
            return self._moved(logits, position), torch.ones_like(logits)
        merge, importance = logits.chunk(2, dim=1)
        return self._moved(merge, position), torch.sigmoid(importance).clamp(min=OMEGA_EPS)

    def _moved(self, merge: Tensor, position: float) -> Tensor:
        """Merge logits (B, K, T) at a position of the dial."""
        if self.slope is None:
            return merge
        if position <= NEVER:  # a ratio of 1: nothing merges, whatever slope a head learned
            return merge + NEVER
        return torch.add(merge, self.slope.float()[:, None], alpha=LINEAR_SCALE * position)


def _without_row(row: int, grad: Tensor) -> Tensor:
    """A gradient that is 0 in one row."""
    grad = grad.clone()
    grad[row] = 0.0
    return grad


class KeepDecision(nn.Module):
    """Never merges; has no parameters.

    >>> KeepDecision()(None, torch.ones(1, 2, 3, 4), None)[0].shape
    torch.Size([1, 2, 3])
    """

    neuron = None
    size_weight = None

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`."""
        logits = torch.full(key.shape[:3], NEVER, device=key.device)
        return logits, torch.ones_like(logits)


class NeuronDecision(nn.Module):
    """The paper: one channel of k decides, one channel of q weighs; both leave attention."""

    size_weight = None

    def __init__(self, neuron: int) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`. Omega is in (eps, 1 + eps), as in the paper."""
        merge = key[..., self.neuron].float() - NEURON_OFFSET
        channel = query[..., self.neuron].float().unflatten(1, (key.shape[1], -1)).mean(2)
        return merge, torch.sigmoid(channel + NEURON_OFFSET) + OMEGA_EPS


def share_in_layer(logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Gives all heads of a layer the mean of both.

    Args:
        logits: (B, K, T) merge logits.
        omega: (B, K, T) importance weights.

    >>> x = torch.tensor([[[0.0], [1.0]]])
    >>> share_in_layer(x, x)[0].flatten().tolist()
    [0.5, 0.5]
    """
    return (
        logits.mean(1, keepdim=True).expand_as(logits),
        omega.mean(1, keepdim=True).expand_as(omega),
    )
