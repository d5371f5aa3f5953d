"""What an attention call is given: the same for every backend.

Legend: B batch, H query heads, K kv heads, G = H / K, T tokens, Q queries, N exact tokens, S
closed entries, D key dim, Dv value dim, R rotary dim. With delay w, query i sees the exact keys
(i-w, i], the entry that is open at i-w, and the entries that were closed before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.core.merging import size_bias
from cachefold.core.rotary import rotate
from cachefold.core.tokens import Tokens

HIDDEN = -1e30
"""Bias on a column that must not be seen; finite, so that a padding query gives no NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelCall:
    """A whole text, decisions soft or hard: for training and scoring, differentiable.

    Query i sees the running entries of the tokens j <= i-w: with bias log(1 - alpha[j+1]) for
    j < i-w (superseded if j+1 merged into it), with none for j = i-w, the entry still open; and
    with `merged_bias` on both.
    """

    query: Tensor
    """(B, H, T, D); queries and keys are rotated to their positions."""
    exact_key: Tensor
    """(B, K, T, D)"""
    exact_value: Tensor
    """(B, K, T, Dv)"""
    merged_key: Tensor
    """(B, K, T, D) running mean keys, each rotated at its newest token."""
    merged_value: Tensor
    """(B, K, T, Dv)"""
    merged_bias: Tensor | None = None
    """(B, K, T) on the scores of the running entries, after the softcap; None = 0."""
    alpha: Tensor
    """(B, K, T) in [0, 1]"""
    valid: Tensor
    """(B, T) bool, False at padding."""
    delay: int
    """w, tokens that stay exact."""
    scaling: float
    """Factor on the scores."""
    softcap: float | None = None
    """Tanh cap on the scores (Gemma 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCall:
    """Q new tokens with hard decisions, entries in pages: for prefill, whole or in chunks.

    What Q tokens see costs Q x S, not Q x T. For inference: no gradient.
    """

    query: Tensor
    """(B, H, Q, D), rotated."""
    pages: Tensor
    """(P, page_size * (D + Dv)), see `core.pages`: all entries closed up to the last query. With
    `open_bias` keys have one channel more, D + 1: the bias on the score of the entry."""
    page_size: int
    """Entries per page, 16 or 32."""
    table: Tensor
    """(B, K, C) int32, the pages of each head in order, then -1."""
    visible: Tensor
    """(B, K, Q) int64, the first so many entries of its head are what a query sees; it never
    falls from one query to the next."""
    open_key: Tensor
    """(B, K, Q, D) mean key of the entry open at i-w, rotated at its newest token."""
    open_value: Tensor
    """(B, K, Q, Dv)"""
    open_bias: Tensor | None = None
    """(B, K, Q) float32 on the scores of the open entries, after the softcap like all biases."""
    open_valid: Tensor
    """(B, Q) bool, False where no entry is open."""
    exact_key: Tensor
    """(B, K, N, D), rotated, N >= Q: the last Q are those of the queries, before them up to w-1
    older tokens."""
    exact_value: Tensor
    """(B, K, N, Dv)"""
    exact_valid: Tensor
    """(B, N) bool, False at padding."""
    delay: int
    """w, tokens that stay exact; with 0 no exact token is seen."""
    scaling: float
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCall:
    """One new token per request: fold what leaves the ring, then attend. Changes state in place.

    The oldest token of the ring leaves: it merges into the open entry, or closes that entry, which
    then goes to the next free slot of its head, and opens the next. The new token takes its place.
    """

    query: Tensor
    """(B, H, 1, D), before rotary embedding."""
    new: Tokens
    """N = 1; `cos` and `sin` may have batch 1; alpha 0 or 1."""
    ring: Tokens
    """N = w, the newest tokens; in place. Missing ones at the start of a text are not valid."""
    turn: Tensor
    """() int64, where the oldest token of the ring is; in place. No ring (w = 0): unchanged."""
    tail: Tokens
    """N = 1, the open entry: mean key and value in float32 (float64), omega = the summed weight,
    cos and sin of its newest token, valid = there is one; in place."""
    pages: Tensor
    """(P, page_size * (D + Dv)), with `size_weight` D + 1 for D as in `PagedCall`; in place."""
    page_size: int
    table: Tensor
    """(B, K, C) int32; every head that closes an entry in this step has a page for it."""
    lengths: Tensor
    """(B, K) int64, closed entries of each head; in place."""
    scaling: float
    softcap: float | None = None
    factors: Tensor | None = None
    """(D,) factors on rotated queries and on keys after each rotation; None = 1."""
    size_weight: Tensor | None = None
    """(K,) float32: closed and open entries have `merging.size_bias` with it, and `new`, `ring` and
    `tail` sizes; None = no bias."""


def folded(call: StepCall) -> PagedCall:
    """What the new token of a step attends to, once the step is folded; rotated."""
    factors = 1.0 if call.factors is None else call.factors
    ring, tail, new = call.ring, call.tail, call.new
    delay, dtype = ring.valid.shape[1], call.query.dtype
    exact = ring if delay else new
    return PagedCall(
        query=rotate(call.query, new.cos, new.sin) * factors,
        pages=call.pages, page_size=call.page_size, table=call.table,
        visible=call.lengths[..., None],
        open_key=rotate(tail.key.to(dtype), tail.cos, tail.sin) * factors,
        open_value=tail.value, open_bias=open_bias(call), open_valid=tail.valid,
        # The ring is no longer in order, but all of it is seen.
        exact_key=rotate(exact.key, exact.cos, exact.sin) * factors,
        exact_value=exact.value, exact_valid=exact.valid,
        delay=delay, scaling=call.scaling, softcap=call.softcap,
    )  # fmt: skip


def open_bias(call: StepCall) -> Tensor | None:
    """(B, K, 1) bias on the open entries of a step; None = 0."""
    if call.size_weight is None:
        return None
    assert call.tail.size is not None
    return size_bias(call.tail.size, call.size_weight)


def entries_have_bias(call: ParallelCall | PagedCall | StepCall) -> bool:
    """Whether entries score higher or lower by a number of their own."""
    if isinstance(call, ParallelCall):
        return call.merged_bias is not None
    return (call.open_bias if isinstance(call, PagedCall) else call.size_weight) is not None


def entry_key_dim(call: PagedCall | StepCall) -> int:
    """Channels of a key in the pages: D, and one more where entries have a bias."""
    return call.query.shape[-1] + entries_have_bias(call)


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
