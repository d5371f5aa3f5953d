"""The training form of `reference.parallel`: exact keys in a band of blocks, not a full square.

Same result, about half the work: no cache, so the stream is the whole text and every token
asks. Legend as in `call`; W = delay, the block length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.attention.call import HIDDEN, AttentionCall, capped, log_survival


def parallel(call: AttentionCall) -> Tensor:
    """Attends from every token of a text to its folded past; no entries from before it.

    Returns:
        (B, H, T, Dv) in the dtype of the query.

    A lone token sees only itself:

    >>> one = torch.ones(1, 1, 1, 2)
    >>> call = AttentionCall(
    ...     query=one, exact_key=one, exact_value=3 * one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0)
    >>> parallel(call).flatten().tolist()
    [3.0, 3.0]
    """
    tokens, delay, softcap = call.query.shape[2], call.delay, call.softcap
    assert tokens == call.alpha.shape[-1] and call.closed_key is None and not call.num_prefix
    query = call.query * call.scaling
    bias = _merged_bias(call.alpha, call.valid, delay)
    merged = capped(_grouped_scores(query, call.merged_key), softcap) + bias
    if delay == 0:
        probabilities = torch.softmax(merged, -1).to(query.dtype)
        return (probabilities @ _ungroup(call.merged_value)).flatten(1, 2)
    near = capped(_band_scores(query, call.exact_key, delay), softcap)
    near = near + _band_bias(call.valid, delay)
    scores = torch.cat([merged, near.flatten(3, 4)[:, :, :, :tokens]], -1)
    probabilities = torch.softmax(scores, -1).to(query.dtype)
    far_part, near_part = probabilities.split([tokens, 2 * delay], -1)
    out = far_part @ _ungroup(call.merged_value)
    near_part = F.pad(near_part, (0, 0, 0, -tokens % delay)).unflatten(3, (-1, delay))
    near_out = near_part @ _band(call.exact_value, delay)[:, :, None]
    return (out + near_out.flatten(3, 4)[:, :, :, :tokens]).flatten(1, 2)


def _ungroup(tensor: Tensor) -> Tensor:
    """(B, K, T, D) -> (B, K, 1, T, D), to broadcast over the query group."""
    return tensor[:, :, None]


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
