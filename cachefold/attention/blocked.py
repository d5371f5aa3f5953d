"""The training form of `reference.parallel`: the same result for a fraction of the work.

No cache, so the stream is the whole text and every token asks. Queries go by blocks of rows that
look no further than they may; their exact keys are a band of blocks of W = delay tokens. Legend
as in `call`; R queries of a block of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.attention.call import HIDDEN, ParallelCall, capped, log_survival

QUERY_ROWS = 256
"""Queries at a time. Scores stay below the 32 MiB above which glibc maps every buffer anew: with
all of 1,024 queries at once, page faults take four times as long as the arithmetic."""


def parallel(call: ParallelCall) -> Tensor:
    """Attends from every token of a text to its folded past.

    Returns:
        (B, H, T, Dv) in the dtype of the query.

    A lone token sees only itself:

    >>> one = torch.ones(1, 1, 1, 2)
    >>> call = ParallelCall(
    ...     query=one, exact_key=one, exact_value=3 * one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0)
    >>> parallel(call).flatten().tolist()
    [3.0, 3.0]
    """
    tokens, width = call.query.shape[2], max(call.delay, 1)
    rows = max(1, QUERY_ROWS // width) * width
    parts = [_attend(call, start, min(start + rows, tokens)) for start in range(0, tokens, rows)]
    return torch.cat(parts, 2)


def _attend(call: ParallelCall, start: int, stop: int) -> Tensor:
    """Queries [start, stop), start a multiple of W; (B, H, stop - start, Dv)."""
    query = call.query[:, :, start:stop] * call.scaling
    width, columns = call.delay, max(stop - call.delay, 0)
    merged = capped(_grouped_scores(query, call.merged_key[:, :, :columns]), call.softcap)
    scores = merged + _merged_bias(call, start, stop)
    if width:
        near = capped(_band_scores(query, call.exact_key, start, width), call.softcap)
        near = (near + _band_bias(call.valid, start, stop, width)).flatten(3, 4)
        scores = torch.cat([scores, near[:, :, :, : stop - start]], -1)
    probabilities = torch.softmax(scores, -1).to(query.dtype)
    out = probabilities[..., :columns] @ _ungroup(call.merged_value[:, :, :columns])
    if width:
        near = F.pad(probabilities[..., columns:], (0, 0, 0, (start - stop) % width))
        near = near.unflatten(3, (-1, width)) @ _band(call.exact_value, start, stop, width)
        out = out + near.flatten(3, 4)[:, :, :, : stop - start]
    return out.flatten(1, 2)


def _ungroup(tensor: Tensor) -> Tensor:
    """(B, K, T, D) -> (B, K, 1, T, D), to broadcast over the query group."""
    return tensor[:, :, None]


def _grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, D) x (B, K, T, D) -> (B, K, G, T, T)."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return grouped @ _ungroup(key).transpose(-1, -2)


def _band(tensor: Tensor, start: int, stop: int, width: int) -> Tensor:
    """(B, K, T, D) -> (B, K, 1, R / W, 2W, D): blocks of [start, stop), each with the one before.

    R is stop - start rounded up to blocks.
    """
    before = 0 if start else width
    part = F.pad(
        tensor[:, :, start - width + before : stop], (0, 0, before, (start - stop) % width)
    )
    blocks = part.unflatten(2, (-1, width))
    return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], 3)[:, :, None]


def _band_scores(query: Tensor, key: Tensor, start: int, width: int) -> Tensor:
    """(B, H, R, D) x (B, K, T, D) -> (B, K, G, R / W, W, 2W), R rounded up to blocks."""
    stop = start + query.shape[2]
    padded = F.pad(query, (0, 0, 0, (start - stop) % width))
    grouped = padded.unflatten(1, (key.shape[1], -1)).unflatten(3, (-1, width))
    return grouped @ _band(key, start, stop, width).transpose(-1, -2)


def _band_bias(valid: Tensor, start: int, stop: int, width: int) -> Tensor:
    """(B, 1, 1, R / W, W, 2W): query r of a block sees columns r+1 .. r+W of its two blocks."""
    row = torch.arange(width, device=valid.device)[:, None]
    column = torch.arange(2 * width, device=valid.device)
    is_near = (column > row) & (column <= row + width)
    real = _band(valid[:, None, :, None], start, stop, width)[..., 0][:, :, :, :, None]
    return torch.where(is_near & real, 0.0, HIDDEN)


def _merged_bias(call: ParallelCall, start: int, stop: int) -> Tensor:
    """(B, K, 1, R, C) for queries [start, stop) and the C running entries they can reach."""
    columns = max(stop - call.delay, 0)
    row = torch.arange(start, stop, device=call.alpha.device)[:, None]
    age = row - call.delay - torch.arange(columns, device=call.alpha.device)
    alpha = call.alpha[..., : columns + 1]
    alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
    bias = log_survival(alpha)[:, :, None, None, :columns] * (age != 0)
    if call.merged_bias is not None:
        bias = bias + call.merged_bias[:, :, None, None, :columns]
    valid = call.valid[:, None, None, None, :columns]
    return bias.masked_fill(~((age >= 0) & valid), HIDDEN)
