"""What one attention call is given: every backend is a function `parallel(call) -> Tensor`.

Legend: B batch, H query heads, K kv heads, G = H / K, N stream tokens, Q queries, S closed
entries, D head dim. With delay w, query i sees the exact keys (i-w, i] and the running entries
of the tokens j <= i-w: with bias log(1 - alpha[j+1]) for j < i-w (superseded if j+1 merged into
it), with none for j = i-w, the entry still open.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -1e30
"""Bias on a column that must not be seen; finite, so that a padding query gives no NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The last Q stream tokens ask; keys and queries are rotated to their positions."""

    query: Tensor
    """(B, H, Q, D)"""
    exact_key: Tensor
    """(B, K, N, D)"""
    exact_value: Tensor
    """(B, K, N, Dv)"""
    merged_key: Tensor
    """(B, K, N, D) running mean keys, each rotated at its newest token."""
    merged_value: Tensor
    """(B, K, N, Dv)"""
    alpha: Tensor
    """(B, K, N) in [0, 1]"""
    valid: Tensor
    """(B, N) bool, False at padding."""
    delay: int
    """w, tokens that stay exact."""
    scaling: float
    """Factor on the scores."""
    softcap: float | None = None
    """Tanh cap on the scores (Gemma 2)."""
    closed_key: Tensor | None = None
    """(B, K, S, D) entries closed before this stream; garbage where not in the mask."""
    closed_value: Tensor | None = None
    """(B, K, S, Dv)"""
    closed_mask: Tensor | None = None
    """(B, K, S) bool, True where an entry exists."""
    num_prefix: int = 0
    """First stream tokens that carry the open entry: never exact; only the last is an entry."""


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores of any shape in at least float32, under the tanh cap.

    >>> capped(torch.tensor([100.0], dtype=torch.bfloat16), 5.0)
    tensor([5.])
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def log_survival(alpha: Tensor) -> Tensor:
    """log(1 - alpha of the next token), (B, K, N); the last column has no successor: 0.

    Clamped below so that the gradient stays finite; alpha = 1 exactly hides the column.

    >>> log_survival(torch.tensor([[[0.0, 1.0, 0.5]]])).tolist()
    [[[-1.0000000150474662e+30, -0.6931471824645996, 0.0]]]
    """
    keep = 1.0 - torch.cat([alpha[..., 1:], torch.zeros_like(alpha[..., :1])], -1)
    log = torch.log(keep.clamp(min=1e-7))
    return log.masked_fill(keep <= 0, HIDDEN)
