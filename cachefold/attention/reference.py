"""Plain torch attention of delayed merging: the ground truth every kernel must match.

Legend and definition: `cachefold.attention.call`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.attention.call import HIDDEN, AttentionCall, capped, log_survival


def parallel(call: AttentionCall) -> Tensor:
    """Attends from the last Q stream tokens.

    Returns:
        (B, H, Q, Dv) in the dtype of the query.

    A lone token sees only itself:

    >>> one = torch.ones(1, 1, 1, 2)
    >>> call = AttentionCall(
    ...     query=one, exact_key=one, exact_value=3 * one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0)
    >>> parallel(call).flatten().tolist()
    [3.0, 3.0]
    """
    query = call.query
    groups = query.shape[1] // call.exact_key.shape[1]
    grouped = query.unflatten(1, (-1, groups)) * call.scaling  # (B, K, G, Q, D)
    exact = _scores(grouped, call.exact_key, call.softcap)
    merged = _scores(grouped, call.merged_key, call.softcap)
    exact_bias, merged_bias = _biases(call)
    columns = [exact + exact_bias, merged + merged_bias]
    values = [call.exact_value, call.merged_value]
    if call.closed_key is not None and call.closed_key.shape[2]:
        assert call.closed_value is not None and call.closed_mask is not None
        hidden = ~call.closed_mask[:, :, None, None, :]
        columns.append(_scores(grouped, call.closed_key, call.softcap).masked_fill(hidden, HIDDEN))
        # Buffers hold garbage beyond their length, NaN included: 0 * NaN must not reach the sum.
        values.append(call.closed_value.masked_fill(~call.closed_mask[..., None], 0.0))
    probabilities = torch.softmax(torch.cat(columns, -1), -1).to(query.dtype)
    parts = probabilities.split([value.shape[2] for value in values], -1)
    out = _weighted(parts[0], values[0].to(query.dtype))
    for part, value in zip(parts[1:], values[1:], strict=True):
        out = out + _weighted(part, value.to(query.dtype))
    return out.flatten(1, 2)


def _scores(grouped: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """(B, K, G, Q, D) x (B, K, S, D) -> (B, K, G, Q, S) in at least float32."""
    groups = grouped.shape[2]
    scores = grouped.flatten(2, 3) @ key.to(grouped.dtype).transpose(-1, -2)
    return capped(scores.unflatten(2, (groups, -1)), softcap)


def _weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    """(B, K, G, Q, S) x (B, K, S, Dv) -> (B, K, G, Q, Dv)."""
    groups = probabilities.shape[2]
    return (probabilities.flatten(2, 3) @ value).unflatten(2, (groups, -1))


def _biases(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Biases on exact and merged columns, (B, K, 1, Q, N) each."""
    alpha, delay = call.alpha, call.delay
    num_tokens = alpha.shape[-1]
    column = torch.arange(num_tokens, device=alpha.device)
    row = column[num_tokens - call.query.shape[2] :, None]
    valid = call.valid[:, None, None, None, :]
    is_exact = (column <= row) & (column > row - delay) & (column >= call.num_prefix)
    is_merged = (column <= row - delay) & (column >= call.num_prefix - 1)
    dtype = torch.float64 if alpha.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=alpha.device)
    exact_bias = torch.where(is_exact & valid, zero, HIDDEN)
    still_open = column == row - delay
    survives = log_survival(alpha.to(dtype))[:, :, None, None, :]
    merged_bias = torch.where(still_open, zero, survives)
    return exact_bias, merged_bias.masked_fill(~(is_merged & valid), HIDDEN)
