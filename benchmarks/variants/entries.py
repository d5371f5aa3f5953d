"""Variants of what an entry is made of, and where it stands.

Legend: B batch, K kv heads, T tokens, D head dim; `alpha`, `omega` as in `core.decisions`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cachefold.attention import pooling
from cachefold.cache import layers
from cachefold.core import merging
from cachefold.core.rotary import rotate
from cachefold.models import attention
from cachefold.models.attention import FoldedAttention
from cachefold.policies.decisions import LinearDecision
from cachefold.policies.dmc import DMC
from variants.registry import of_whole_texts, swapped, variant

LEAST = 1e-6
"""Weight of a token that got no attention: it must have some."""


@variant
def mean_merge() -> AbstractContextManager[None]:
    """Are the learned weights worth it, or is the plain mean of its tokens as good an entry?"""
    original = DMC.share

    def share(self: Any, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        return original(self, logits, torch.ones_like(omega))

    return swapped((DMC, "share", share))


@variant
def attention_weights() -> AbstractContextManager[None]:
    """Are tokens better weighed by the attention they got while exact than by learned weights?

    That of the `delay` queries which see a token before it leaves the ring (of itself without a
    delay), over all tokens of the text and not its entries.
    """
    fold, decide = FoldedAttention.forward, LinearDecision.forward
    layer: Any = None
    turns: tuple[Tensor, Tensor] | None = None

    def fold_forward(
        self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> Any:
        nonlocal layer, turns
        layer, turns = self, position_embeddings
        return fold(self, hidden_states, position_embeddings, **kwargs)

    def forward(
        self: Any, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        logits, _ = decide(self, query, key, hidden_states, position)
        assert turns is not None
        query, key = rotate(query, *turns), rotate(key, *turns)
        received = received_attention(query, key, layer.scaling, max(layer.policy.delay, 1))
        return logits, received.to(logits.dtype).clamp(min=LEAST)

    swaps = [(FoldedAttention, "forward", fold_forward), (LinearDecision, "forward", forward)]
    return swapped(of_whole_texts(FoldedAttention._alpha), *swaps)


@torch.no_grad()
def received_attention(query: Tensor, key: Tensor, scaling: float, reach: int) -> Tensor:
    """Mean attention that tokens get from the first queries which see them, themselves among these.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, K, T, D), rotated.
        scaling: of scores.
        reach: how many queries.

    Returns:
        (B, K, T), mean over the queries of a kv head; the last tokens get theirs from fewer.

    >>> received_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4), 1.0, 2).tolist()
    [[[0.75, 0.4166666865348816, 0.1666666716337204]]]
    """
    query, key = query.unflatten(1, (key.shape[1], -1)).float(), key[:, :, None].float()
    with torch.autocast(key.device.type, enabled=False):
        scores = query @ key.mT * scaling
    square = torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device)
    attention_weights = scores.masked_fill(~square.tril(), -torch.inf).softmax(-1).mean(2)
    near = attention_weights * (square.tril() & ~square.tril(-reach))
    return near.sum(2) / reach


@variant
def mlp_residual() -> AbstractContextManager[None]:
    """Can a small network make a better entry than the mean, as a change of it that is learned?"""
    build, decide = DMC.build_decision, FoldedAttention._alpha
    change: Any = None

    def build_decision(self: Any, hidden_size: int, num_kv_heads: int, head_dim: int) -> Any:
        decision = build(self, hidden_size, num_kv_heads, head_dim)
        decision.change = Change(num_kv_heads, head_dim)
        return decision

    def alpha(self: Any, *args: Any) -> Tensor:
        nonlocal change
        change = self.decision.change
        return decide(self, *args)

    def running_means(
        key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_key, mean_value, weight = pooling.running_means(key, value, alpha, omega, window)
        # A token alone is no mean: it stays as it is.
        merged = 1 - 1 / merging.running_sizes(alpha)[..., None]
        key_change, value_change = change(mean_key, mean_value)
        return mean_key + merged * key_change, mean_value + merged * value_change, weight

    return swapped(
        of_whole_texts(alpha),
        (DMC, "build_decision", build_decision),
        (attention, "running_means", running_means),
        (layers, "running_means", running_means),
    )


class Change(nn.Module):
    """One hidden layer for each kv head, over a key and a value; 0 before training.

    Both are read and changed in units of their own size: keys are many times as large as values.

    Args:
        heads: K.
        size: D of both.

    >>> change = Change(2, 8)
    >>> key_change, _ = change(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8))
    >>> key_change.shape, key_change.abs().sum().item()
    (torch.Size([1, 2, 5, 8]), 0.0)
    """

    HIDDEN = 32
    PACE = 0.2
    """Factor on what is learned, so that a step changes entries about as much as one of LoRA."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inner = torch.randn(heads, 2 * size, self.HIDDEN, generator=generator)
        self.inner = nn.Parameter(inner * (2 * size) ** -0.5)
        self.outer = nn.Parameter(torch.zeros(heads, self.HIDDEN, 2 * size))

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, T, D) each, in and out."""
        scales = [x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6) for x in (key, value)]
        both = torch.cat([key / scales[0], value / scales[1]], -1)
        with torch.autocast(key.device.type, enabled=False):
            hidden = nn.functional.silu(both @ self.inner.to(key.dtype))
            made = self.PACE * hidden @ self.outer.to(key.dtype)
        key_change, value_change = made.chunk(2, -1)
        return key_change * scales[0], value_change * scales[1]


@variant
def first_position() -> AbstractContextManager[None]:
    """Is an entry better placed at its first token than at its newest?"""
    return _entries_placed(lambda alpha, omega: merging.running_sizes(alpha) - 1.0)


@variant
def mean_position() -> AbstractContextManager[None]:
    """Is an entry better placed at the weighted mean of its tokens' positions?"""

    def back(alpha: Tensor, omega: Tensor) -> Tensor:
        places = torch.arange(alpha.shape[-1], device=alpha.device).float().expand_as(alpha)
        mean, _, _ = pooling.running_means(places[..., None], places[..., None], alpha, omega)
        return places - mean[..., 0]

    return _entries_placed(back)


def _entries_placed(back: Callable[[Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
    """Rotates entries to a place so many tokens before their newest token.

    Mean keys are turned back before they are rotated to the newest token, so that nothing else has
    to know. `back` makes (B, K, T) tokens of alpha and omega; of soft ones a soft number.
    """
    decide, angles = FoldedAttention._alpha, torch.empty(0)

    def alpha(self: Any, *args: Any) -> Tensor:
        nonlocal angles
        angles = _token_angles(self.config, self.head_dim)
        return decide(self, *args)

    def running_means(
        key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_key, mean_value, weight = pooling.running_means(key, value, alpha, omega, window)
        assert window is None, "a window bounds what counts to the place of an entry too"
        turn = -back(alpha, omega)[..., None] * angles.to(alpha.device)
        # Each head turns by numbers of its own: heads stand where requests do.
        keys, cos, sin = (x.flatten(0, 1) for x in (mean_key, turn.cos(), turn.sin()))
        return rotate(keys[:, None], cos, sin).view_as(mean_key), mean_value, weight

    return swapped(
        of_whole_texts(alpha),
        (attention, "running_means", running_means),
        (layers, "running_means", running_means),
    )


def _token_angles(config: Any, dim: int) -> Tensor:
    """(D,) what the rotary embedding turns by from one token to the next."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"positions of entries are for plain rotary embeddings: {rope}")
    return rope["rope_theta"] ** (-torch.arange(0, dim, 2).repeat(2) / dim)
