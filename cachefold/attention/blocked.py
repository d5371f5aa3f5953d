"""The training form of `reference.parallel`: exact keys in a band of blocks, not a full square.

Same result, about half the work: no cache, so the stream is the whole text and every token
asks. Legend as in `reference`; W = delay, the block length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.attention.reference import HIDDEN, log_survival


def parallel(
    query: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    merged_key: Tensor,
    merged_value: Tensor,
    alpha: Tensor,
    *,
    delay: int,
    scaling: float,
    valid: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Attends from every token of a text to its folded past; see `reference.parallel`.

    Args:
        query: (B, H, T, D), rotated.
        exact_key: (B, K, T, D), rotated.
        exact_value: (B, K, T, D).
        merged_key: (B, K, T, D), rotated.
        merged_value: (B, K, T, D).
        alpha: (B, K, T).
        delay: tokens that stay exact.
        scaling: factor on the scores.
        valid: (B, T) bool.
        softcap: tanh cap on the scores.

    Returns:
        (B, H, T, D).
    """
    tokens = query.shape[2]
    query = query * scaling
    merged = _cap(_grouped_scores(query, merged_key), softcap) + _merged_bias(alpha, valid, delay)
    if delay == 0:
        probabilities = torch.softmax(merged, -1).to(query.dtype)
        return (probabilities @ _ungroup(merged_value)).flatten(1, 2)
    near = _cap(_band_scores(query, exact_key, delay), softcap) + _band_bias(valid, delay)
    scores = torch.cat([merged, near.flatten(3, 4)[:, :, :, :tokens]], -1)
    probabilities = torch.softmax(scores, -1).to(query.dtype)
    far_part, near_part = probabilities.split([tokens, 2 * delay], -1)
    out = far_part @ _ungroup(merged_value)
    near_part = F.pad(near_part, (0, 0, 0, -tokens % delay)).unflatten(3, (-1, delay))
    near_out = near_part @ _band(exact_value, delay)[:, :, None]
    return (out + near_out.flatten(3, 4)[:, :, :, :tokens]).flatten(1, 2)


def _ungroup(tensor: Tensor) -> Tensor:
    """(B, K, T, D) -> (B, K, 1, T, D), to broadcast over the query group."""
    return tensor[:, :, None]


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, D) x (B, K, T, D) -> (B, K, G, T, T)."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return grouped @ _ungroup(key).transpose(-1, -2)


def _band(tensor: Tensor, width: int) -> Tensor:
    """(B, K, T, D) -> (B, K, T / W, 2W, D): every block with the block before it."""
    blocks = F.pad(tensor, (0, 0, width, -tensor.shape[2] % width)).unflatten(2, (-1, width))
    return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], 3)


def _band_scores(query: Tensor, key: Tensor, width: int) -> Tensor:
    """(B, K, G, T / W, W, 2W)."""
    padded = F.pad(query, (0, 0, 0, -query.shape[2] % width))
    grouped = padded.unflatten(1, (key.shape[1], -1)).unflatten(3, (-1, width))
    return grouped @ _band(key, width)[:, :, None].transpose(-1, -2)


def _band_bias(valid: Tensor, width: int) -> Tensor:
    """(B, 1, 1, T / W, W, 2W): query r of a block sees columns r+1 .. r+W of its two blocks."""
    row = torch.arange(width, device=valid.device)[:, None]
    column = torch.arange(2 * width, device=valid.device)
    is_near = (column > row) & (column <= row + width)
    real = _band(valid[:, None, :, None], width)[..., 0][:, :, None, :, None]
    return torch.where(is_near & real, 0.0, HIDDEN)


def _merged_bias(alpha: Tensor, valid: Tensor, delay: int) -> Tensor:
    """(B, K, 1, T, T)."""
    column = torch.arange(alpha.shape[-1], device=alpha.device)
    age = column[:, None] - column - delay
    alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
    bias = log_survival(alpha)[:, :, None, None, :] * (age != 0)
    return bias.masked_fill(~((age >= 0) & valid[:, None, None, None, :]), HIDDEN)
