"""A block of queries against closed entries, open entries and exact tokens, in plain torch.

Matrix products and one softmax, not `scaled_dot_product_attention`: given a mask, that takes two to
three times as long in bfloat16 on a CPU, no less in float32, and knows no tanh cap.

Legend as in `call`; R queries of a block of rows, W queries of a block of the band, n = R / W, C
columns of exact keys that a block of the band looks at.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.attention.call import HIDDEN, PagedCall, capped


def prepared(call: PagedCall) -> PagedCall:
    """The call with scaled queries, and with hidden tokens before the exact ones.

    Those are then delay - 1 + Q, so that every block finds a whole window.
    """
    query = call.query * call.scaling
    missing = max(call.delay - 1, 0) + query.shape[2] - call.exact_key.shape[2]
    return replace(
        call,
        query=query,
        exact_key=F.pad(call.exact_key.to(query.dtype), (0, 0, missing, 0)),
        exact_value=F.pad(call.exact_value.to(query.dtype), (0, 0, missing, 0)),
        exact_valid=F.pad(call.exact_valid, (missing, 0)),
    )


def attend_rows(
    call: PagedCall, key: Tensor, value: Tensor, rows: tuple[int, int], common: int, width: int
) -> Tensor:
    """Attends from some queries to closed entries, open entries and exact tokens.

    Args:
        call: as `prepared` makes it, or the part of one head.
        key: (B, K, D, S) or with a bias (B, K, D + 1, S), closed entries.
        value: (B, K, S, Dv), finite where no query sees it.
        rows: [start, stop) of the queries, n blocks of W.
        common: entries that all of them see.
        width: W.

    Returns:
        (B, K, n, G, W, Dv).
    """
    start, stop = rows
    query = call.query[:, :, start:stop].unflatten(1, (key.shape[1], -1))
    query = query.unflatten(3, (-1, width)).transpose(2, 3)  # (B, K, n, G, W, D)
    scores = [
        _closed_scores(call, query, key, call.visible[:, :, start:stop], common),
        _open_scores(call, query, start, stop),
    ]
    if call.delay:
        scores.append(_band_scores(call, query, start, stop))
    probabilities = torch.softmax(torch.cat(scores, -1), -1).to(query.dtype)
    closed, opened, exact = probabilities.tensor_split((key.shape[3], key.shape[3] + 1), -1)
    out = (closed.flatten(2, 4) @ value).unflatten(2, query.shape[2:5])
    out = out + opened * _by_width(call.open_value[:, :, start:stop], width).to(query.dtype)
    if call.delay:
        near = _windows(call.exact_value, call, start, stop, width).transpose(-1, -2)
        out = out + (exact.flatten(3, 4) @ near).unflatten(3, query.shape[3:5])
    return out


def _closed_scores(
    call: PagedCall, query: Tensor, key: Tensor, visible: Tensor, common: int
) -> Tensor:
    """(B, K, n, G, W, S)."""
    dim = query.shape[-1]
    scores = (query.flatten(2, 4) @ key[:, :, :dim]).unflatten(2, query.shape[2:5])
    scores = _capped(scores, call.softcap)
    if call.open_bias is not None:
        scores = scores + key[:, :, None, None, None, dim]
    column = torch.arange(common, key.shape[3], device=key.device)
    hidden = column >= _by_width(visible[..., None], query.shape[4])
    _hide(scores[..., common:], hidden)
    return scores


def _open_scores(call: PagedCall, query: Tensor, start: int, stop: int) -> Tensor:
    """(B, K, n, G, W, 1)."""
    key = _by_width(call.open_key[:, :, start:stop], query.shape[4])
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) * key.to(wide)).sum(-1, keepdim=True)
    scores = _capped(scores.to(query.dtype), call.softcap)
    if call.open_bias is not None:
        bias = _by_width(call.open_bias[:, :, start:stop, None], query.shape[4])
        scores = scores + bias.to(scores.dtype)
    valid = _by_width(call.open_valid[:, None, start:stop, None], query.shape[4])
    return _hide(scores, ~valid)


def _band_scores(call: PagedCall, query: Tensor, start: int, stop: int) -> Tensor:
    """(B, K, n, G, W, C): query r of a block sees tokens r .. r + delay - 1 of its window."""
    groups, width = query.shape[3:5]
    near = _windows(call.exact_key, call, start, stop, width)
    scores = _capped((query.flatten(3, 4) @ near).unflatten(3, (groups, width)), call.softcap)
    age = torch.arange(near.shape[-1], device=near.device)
    age = age - torch.arange(width, device=near.device)[:, None]
    valid = _windows(call.exact_valid[:, None, :, None], call, start, stop, width)
    is_near = (age >= 0) & (age < call.delay) & valid  # (B, 1, n, W, C)
    return _hide(scores, ~is_near[:, :, :, None])


def _windows(tensor: Tensor, call: PagedCall, start: int, stop: int, width: int) -> Tensor:
    """Views the exact tokens (B, K, N, D) that each block of queries looks at, (B, K, n, D, C)."""
    older = call.delay - 1
    return tensor[:, :, start : stop + older].unfold(2, width + older, width)


def _by_width(tensor: Tensor, width: int) -> Tensor:
    """(B, K, R, D) -> (B, K, n, 1, W, D), to broadcast over the query group."""
    return tensor.unflatten(2, (-1, width))[:, :, :, None]


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Under the tanh cap; without one in their own dtype, from which softmax widens by itself."""
    return scores if softcap is None else capped(scores, softcap)


def _hide(scores: Tensor, hidden: Tensor) -> Tensor:
    """Hides columns, in place; float16 has no number as low as HIDDEN."""
    return scores.masked_fill_(hidden, max(HIDDEN, torch.finfo(scores.dtype).min))
