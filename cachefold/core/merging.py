"""Merging keys and values into entries: the recurrence and its parallel form.

Both return the *running* entry after every token: the weighted mean of the tokens merged so far.
Legend: B batch, K kv heads, T tokens, D head dim. Equations: Nawrot et al. 2024, section 3:
`z = alpha*z + omega`, `S = alpha*S + omega*x`, entry = `S / z`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens per block of the blocked scan: the decay matrix of a block has BLOCK x BLOCK elements.
BLOCK = 32


class MergeState(NamedTuple):
    """What the recurrence carries from token to token: the terms of the open entry.

    With no window the terms are already summed (L = 1); with one, the last `window` are kept.
    """

    weight: Tensor
    """(B, K, L)"""
    key: Tensor
    """(B, K, L, D), multiplied by the weight"""
    value: Tensor
    """(B, K, L, D), multiplied by the weight"""


def merge_step(
    state: MergeState | None,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    omega: Tensor,
    window: int | None = None,
) -> tuple[MergeState, Tensor, Tensor]:
    """Folds one token into the open entry.

    Args:
        state: the open entry, or None before the first token (whose alpha then has no effect).
        key: (B, K, D), before rotary embedding.
        value: (B, K, D).
        alpha: (B, K) in [0, 1].
        omega: (B, K) > 0.
        window: most tokens an entry averages; None = no bound.

    Returns:
        The new state, and the entry's key and value, (B, K, D) each.

    >>> one = torch.ones(1, 1)
    >>> state, key, _ = merge_step(None, one[..., None], one[..., None], 0 * one, one)
    >>> state, key, _ = merge_step(state, 4 * one[..., None], one[..., None], one, 2 * one)
    >>> key.item()  # (1*1 + 2*4) / 3
    3.0
    """
    weight, decay = omega[..., None], alpha[..., None]
    new = MergeState(weight, (weight * key)[:, :, None], (weight * value)[:, :, None])
    if state is not None:
        terms = (state.weight * decay, state.key * decay[..., None], state.value * decay[..., None])
        pairs = zip(terms, new, strict=True)
        if window is None:
            new = MergeState(*(old + term for old, term in pairs))
        else:
            new = MergeState(*(torch.cat(pair, 2)[:, :, -window:] for pair in pairs))
    total = new.weight.sum(-1, keepdim=True)
    return new, new.key.sum(2) / total, new.value.sum(2) / total


def merge_sequential(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truth of `running_means`: the recurrence, token by token.

    Args:
        key: (B, K, T, D), before rotary embedding.
        value: (B, K, T, Dv).
        alpha: (B, K, T) in [0, 1]; that of the first token has no effect.
        omega: (B, K, T) > 0.
        window: most tokens an entry averages; None = no bound.

    Returns:
        Mean keys (B, K, T, D), mean values (B, K, T, Dv) and weights z (B, K, T), in the dtype
        of the inputs.

    The worked example of the paper (4 tokens, 2 entries: those before an append and the last):

    >>> key = torch.tensor([[1., 2], [2, 3], [4, 5], [6, 7]])[None, None]
    >>> value = torch.tensor([[5., 6], [6, 7], [8, 9], [10, 11]])[None, None]
    >>> alpha = torch.tensor([[[0., 1, 0, 1]]]); omega = torch.tensor([[[.6, .4, .7, .3]]])
    >>> keys, values, _ = merge_sequential(key, value, alpha, omega)
    >>> [[round(x, 4) for x in row] for row in keys[0, 0, [1, 3]].tolist()]
    [[1.4, 2.4], [4.6, 5.6]]
    >>> [[round(x, 4) for x in row] for row in values[0, 0, [1, 3]].tolist()]
    [[5.4, 6.4], [8.6, 9.6]]
    """
    state, keys, values, weights = None, [], [], []
    for t in range(key.shape[2]):
        token = (key[:, :, t], value[:, :, t], alpha[:, :, t], omega[:, :, t])
        state, mean_key, mean_value = merge_step(state, *token, window)
        keys.append(mean_key)
        values.append(mean_value)
        weights.append(state.weight.sum(-1))
    return torch.stack(keys, 2), torch.stack(values, 2), torch.stack(weights, 2)


def running_means(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Running entry after every token, in parallel over tokens; differentiable in all inputs.

    Args:
        key: (B, K, T, D), before rotary embedding.
        value: (B, K, T, Dv).
        alpha: (B, K, T) in [0, 1]; that of the first token has no effect.
        omega: (B, K, T) > 0.
        window: most tokens an entry averages; None = no bound.

    Returns:
        Mean keys (B, K, T, D), mean values (B, K, T, Dv) and weights z (B, K, T), in float32 (in
        float64 when `key` is).

    >>> key = torch.tensor([[[[1.0], [3.0]]]])
    >>> running_means(key, key, torch.ones(1, 1, 2), torch.ones(1, 1, 2))[0].flatten().tolist()
    [1.0, 2.0]
    """
    # Autocast would do the matmuls of the scan in half precision, whatever the dtype of the terms.
    with torch.autocast(key.device.type, enabled=False):
        return _running_means(key, value, alpha, omega, window)


def running_sizes(alpha: Tensor, size: Tensor | None = None) -> Tensor:
    """How many tokens the running entry holds after every token; differentiable.

    n = alpha*n + 1: the recurrence of the mean with a weight of 1 for every token, so that a soft
    alpha gives a soft number.

    Args:
        alpha: (B, K, T) in [0, 1]; that of the first token has no effect.
        size: (B, K, T), what each token stands for; None = 1.

    Returns:
        (B, K, T) in float32 (in float64 when `alpha` is), at least 1 where every size is.

    >>> running_sizes(torch.tensor([[[0.0, 1.0, 1.0, 0.0]]])).flatten().tolist()
    [1.0, 2.0, 3.0, 1.0]
    """
    alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
    size = torch.ones_like(alpha) if size is None else size.to(alpha.dtype)
    with torch.autocast(alpha.device.type, enabled=False):
        return _decayed_sums(alpha, size[..., None])[..., 0]


def size_bias(sizes: Tensor, weight: Tensor) -> Tensor:
    """What proportional attention adds to the score of an entry: weight * log(size).

    A mean key has one column in the softmax where its tokens had `size`. Bolya et al. 2023 (Token
    Merging, section 3, equation 1) add log(size); here each head scales it.

    Args:
        sizes: (B, K, N), at least 1.
        weight: (K,), learned.

    >>> size_bias(torch.tensor([[[1.0, 2.0]]]), torch.tensor([1.0])).flatten().tolist()
    [0.0, 0.6931471824645996]
    """
    return weight.to(sizes.dtype)[:, None] * sizes.log()


def _running_means(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    alpha, omega = alpha.to(dtype), omega.to(dtype)
    if window == 1:  # every entry is its newest token
        return key.to(dtype), value.to(dtype), omega
    terms = torch.cat(
        [key.to(dtype), value.to(dtype), torch.ones_like(key[..., :1], dtype=dtype)], -1
    )
    terms = terms * omega[..., None]
    if window is None:
        sums = _decayed_sums(alpha, terms)
    else:
        sums = _windowed_sums(alpha, terms, window)
    weight = sums[..., -1:]
    mean_key, mean_value = (sums[..., :-1] / weight).split([key.shape[-1], value.shape[-1]], -1)
    return mean_key, mean_value, weight[..., 0]


def _windowed_sums(alpha: Tensor, terms: Tensor, window: int) -> Tensor:
    """x_t = sum over j < window of alpha_t * ... * alpha_{t-j+1} * term_{t-j}.

    The partial accumulations of training in Nawrot et al. 2024, section 3, written out: the
    recurrence S_t = alpha_t * S_{t-1} + term_t, unrolled and cut after `window` terms.
    """
    sums, decay = terms, torch.ones_like(alpha)
    shifted = alpha
    for offset in range(1, min(window, alpha.shape[-1])):
        decay = decay * shifted
        decay = torch.cat([torch.zeros_like(decay[..., :offset]), decay[..., offset:]], -1)
        sums = sums + decay[..., None] * F.pad(terms, (0, 0, offset, 0))[..., :-offset, :]
        shifted = F.pad(alpha, (offset, 0))[..., :-offset]
    return sums


def _decayed_sums(alpha: Tensor, terms: Tensor) -> Tensor:
    """Solves S_t = alpha_t * S_{t-1} + terms_t by blocks; alpha (..., T), terms (..., T, E)."""
    num_tokens = alpha.shape[-1]
    if num_tokens <= BLOCK:
        return _decay_matrix(alpha) @ terms
    padding = -num_tokens % BLOCK
    alpha = F.pad(alpha, (0, padding)).unflatten(-1, (-1, BLOCK))
    terms = F.pad(terms, (0, 0, 0, padding)).unflatten(-2, (-1, BLOCK))
    inside = _decay_matrix(alpha) @ terms
    # What enters a block is the recurrence over whole blocks, one step per block.
    reach = torch.cumprod(alpha, -1)
    carried = _decayed_sums(reach[..., -1], inside[..., -1, :])
    entering = F.pad(carried, (0, 0, 1, 0))[..., :-1, :]
    sums = inside + reach[..., None] * entering[..., None, :]
    return sums.flatten(-3, -2)[..., :num_tokens, :]


def _decay_matrix(alpha: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): product of alpha over (j, t] at [t, j], 0 above the diagonal."""
    num_tokens = alpha.shape[-1]
    square = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=alpha.device)
    below, not_above = square.tril(-1), square.tril()
    factors = torch.where(below, alpha[..., :, None], torch.ones((), dtype=alpha.dtype))
    decay = torch.cumprod(factors, -2) * not_above
    # Denormal products slow CPU matmuls tenfold; a decay this small carries nothing. An exact 0
    # stays in the graph: straight-through needs the gradient of an alpha that is 0.
    return decay.masked_fill((decay > 0) & (decay < 1e-30), 0.0)
