"""Plain torch attention of delayed merging: the ground truth every kernel must match.

Legend: B batch, H query heads, K kv heads, G = H / K, N stream tokens, Q queries, S closed
entries, D head dim. With delay w, query i sees the exact keys (i-w, i] and the running entries
of the tokens j <= i-w: with bias log(1 - alpha[j+1]) for j < i-w (superseded if j+1 merged into
it), with none for j = i-w, the entry still open.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30
"""Bias on a column that must not be seen; finite, so that a padding query gives no NaN."""


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
    closed_key: Tensor | None = None,
    closed_value: Tensor | None = None,
    closed_mask: Tensor | None = None,
    softcap: float | None = None,
    num_prefix: int = 0,
) -> Tensor:
    """Attends from the last Q stream tokens.

    Args:
        query: (B, H, Q, D), rotated.
        exact_key: (B, K, N, D), rotated.
        exact_value: (B, K, N, D).
        merged_key: (B, K, N, D) running mean keys, rotated at their newest token.
        merged_value: (B, K, N, D).
        alpha: (B, K, N) in [0, 1].
        delay: w, tokens that stay exact.
        scaling: factor on the scores.
        valid: (B, N) bool, or (B, K, N); False at padding.
        closed_key: (B, K, S, D) entries closed before this stream, rotated.
        closed_value: (B, K, S, D).
        closed_mask: (B, K, S) bool, True where an entry exists.
        softcap: tanh cap on the scores (Gemma 2).
        num_prefix: first stream tokens that carry the open entry: never exact, and only the
            last of them is an entry.

    Returns:
        (B, H, Q, D) in the dtype of `query`.
    """
    groups = query.shape[1] // exact_key.shape[1]
    grouped = query.unflatten(1, (-1, groups)) * scaling  # (B, K, G, Q, D)
    num_queries = query.shape[2]
    exact = _scores(grouped, exact_key, softcap)
    merged = _scores(grouped, merged_key, softcap)
    exact_bias, merged_bias = _biases(alpha, valid, delay, num_queries, num_prefix)
    columns = [exact + exact_bias, merged + merged_bias]
    values = [exact_value, merged_value]
    if closed_key is not None and closed_key.shape[2]:
        assert closed_value is not None and closed_mask is not None
        hidden = ~closed_mask[:, :, None, None, :]
        # Buffers hold garbage beyond their length, NaN included: 0 * NaN must not reach the sum.
        closed_value = closed_value.masked_fill(~closed_mask[..., None], 0.0)
        columns.append(_scores(grouped, closed_key, softcap).masked_fill(hidden, HIDDEN))
        values.append(closed_value)
    probabilities = torch.softmax(torch.cat(columns, -1), -1).to(query.dtype)
    out = torch.zeros_like(grouped)
    for part, value in zip(
        probabilities.split([v.shape[2] for v in values], -1), values, strict=True
    ):
        out = out + _weighted(part, value.to(query.dtype))
    return out.flatten(1, 2)


def _scores(grouped: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """(B, K, G, Q, D) x (B, K, S, D) -> (B, K, G, Q, S) in at least float32."""
    groups = grouped.shape[2]
    scores = grouped.flatten(2, 3) @ key.to(grouped.dtype).transpose(-1, -2)
    scores = scores.unflatten(2, (groups, -1))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    groups = probabilities.shape[2]
    return (probabilities.flatten(2, 3) @ value).unflatten(2, (groups, -1))


def _biases(
    alpha: Tensor, valid: Tensor, delay: int, num_queries: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Biases on exact and merged columns, (B, K, 1, Q, N) each."""
    num_tokens = alpha.shape[-1]
    column = torch.arange(num_tokens, device=alpha.device)
    row = column[num_tokens - num_queries :, None]
    valid = valid if valid.dim() == 3 else valid[:, None]
    valid = valid[:, :, None, None, :]
    is_exact = (column <= row) & (column > row - delay) & (column >= num_prefix)
    is_merged = (column <= row - delay) & (column >= num_prefix - 1)
    dtype = torch.float64 if alpha.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=alpha.device)
    exact_bias = torch.where(is_exact & valid, zero, HIDDEN)
    still_open = column == row - delay
    survives = log_survival(alpha.to(dtype))[:, :, None, None, :]
    merged_bias = torch.where(still_open, zero, survives)
    return exact_bias, merged_bias.masked_fill(~(is_merged & valid), HIDDEN)


def log_survival(alpha: Tensor) -> Tensor:
    """log(1 - alpha of the next token), (B, K, N); the last column has no successor: 0.

    Clamped below so that the gradient stays finite; alpha = 1 exactly hides the column.
    """
    keep = 1.0 - torch.cat([alpha[..., 1:], torch.zeros_like(alpha[..., :1])], -1)
    log = torch.log(keep.clamp(min=1e-7))
    return log.masked_fill(keep <= 0, HIDDEN)
