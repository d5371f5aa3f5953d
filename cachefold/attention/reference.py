"""Plain torch attention of delayed merging: the ground truth every kernel must match.

Written for being right at a glance: all columns side by side, one softmax. Legend and definition:
`cachefold.attention.call`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cachefold.attention import blocked
from cachefold.attention.call import (
    HIDDEN,
    PagedCall,
    ParallelCall,
    StepCall,
    capped,
    entry_key_dim,
    folded,
    log_survival,
    open_bias,
)
from cachefold.core.pages import gather, key_view, slots, value_view
from cachefold.core.rotary import rotate
from cachefold.core.tokens import Tokens, token_dim


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
    grouped = _grouped(call)
    exact_bias, merged_bias = _biases(call)
    return _softmax(
        [
            capped(_scores(grouped, call.exact_key), call.softcap) + exact_bias,
            capped(_scores(grouped, call.merged_key), call.softcap) + merged_bias,
        ],
        [call.exact_value, call.merged_value],
        call.query.dtype,
    )


def _grouped(call: ParallelCall | PagedCall) -> Tensor:
    """Scaled queries, (B, K, G, Q, D)."""
    return call.query.unflatten(1, (call.exact_key.shape[1], -1)) * call.scaling


def _scores(grouped: Tensor, key: Tensor) -> Tensor:
    """(B, K, G, Q, D) x (B, K, S, D) -> (B, K, G, Q, S) in at least float32."""
    groups = grouped.shape[2]
    scores = grouped.flatten(2, 3) @ key.to(grouped.dtype).transpose(-1, -2)
    return scores.unflatten(2, (groups, -1))


def _softmax(scores: list[Tensor], values: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One softmax over all columns; scores (B, K, G, Q, S), values (B, K, S, Dv) each."""
    probabilities = torch.softmax(torch.cat(scores, -1), -1).to(dtype)
    parts = probabilities.split([value.shape[2] for value in values], -1)
    out = _weighted(parts[0], values[0].to(dtype))
    for part, value in zip(parts[1:], values[1:], strict=True):
        out = out + _weighted(part, value.to(dtype))
    return out.flatten(1, 2)


def _weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    """(B, K, G, Q, S) x (B, K, S, Dv) -> (B, K, G, Q, Dv)."""
    groups = probabilities.shape[2]
    return (probabilities.flatten(2, 3) @ value).unflatten(2, (groups, -1))


def _biases(call: ParallelCall) -> tuple[Tensor, Tensor]:
    """Biases on exact and merged columns, (B, K, 1, T, T) each."""
    alpha, delay = call.alpha, call.delay
    column = torch.arange(alpha.shape[-1], device=alpha.device)
    row = column[:, None]
    valid = call.valid[:, None, None, None, :]
    is_exact = (column <= row) & (column > row - delay)
    dtype = torch.float64 if alpha.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=alpha.device)
    exact_bias = torch.where(is_exact & valid, zero, HIDDEN)
    still_open = column == row - delay
    survives = log_survival(alpha.to(dtype))[:, :, None, None, :]
    merged_bias = torch.where(still_open, zero, survives)
    if call.merged_bias is not None:
        merged_bias = merged_bias + call.merged_bias[:, :, None, None, :]
    return exact_bias, merged_bias.masked_fill(~((column <= row - delay) & valid), HIDDEN)


def attend(call: PagedCall) -> Tensor:
    """Attends from new tokens to the entries in pages, the open entries and the exact tokens.

    Returns:
        (B, H, Q, Dv) in the dtype of the query.

    Two entries of one page, one of which the first query sees:

    >>> one = torch.ones(1, 1, 2, 1)
    >>> pages = torch.cat([torch.zeros(1, 16), torch.arange(16.0)[None]], 1)
    >>> call = PagedCall(
    ...     query=one, pages=pages, page_size=16, table=torch.zeros(1, 1, 1, dtype=torch.int32),
    ...     visible=torch.tensor([[[1, 3]]]), open_key=one, open_value=one,
    ...     open_valid=torch.zeros(1, 2, dtype=torch.bool), exact_key=one, exact_value=one,
    ...     exact_valid=torch.zeros(1, 2, dtype=torch.bool), delay=1, scaling=1.0)
    >>> attend(call).flatten().tolist()
    [0.0, 1.0]
    """
    grouped = _grouped(call)
    size, dim = call.page_size, call.query.shape[-1]
    closed_key, closed_value = gather(call.pages, size, entry_key_dim(call), call.table)
    # Pages hold garbage beyond the length, NaN included: 0 * NaN must not reach the sum.
    exists = slots(call.visible[..., -1], call.table.shape[2], size)[..., None]
    closed_key, closed_value = (t.masked_fill(~exists, 0.0) for t in (closed_key, closed_value))
    seen = slots(call.visible, call.table.shape[2], size)[:, :, None]  # (B, K, 1, Q, S)
    closed = capped(_scores(grouped, closed_key[..., :dim]), call.softcap)
    exact = capped(_scores(grouped, call.exact_key), call.softcap)
    of_open = capped(_scores(grouped, call.open_key), call.softcap)
    if call.open_bias is not None:
        closed = closed + closed_key[:, :, None, None, :, dim]
        of_open = of_open + call.open_bias[:, :, None, None, :]
    closed = closed.masked_fill(~seen, HIDDEN)
    # The open entry is one column of its own per query: the diagonal of all columns.
    own = torch.eye(call.query.shape[2], dtype=torch.bool, device=exact.device)
    is_open = own & call.open_valid[:, None, None, None]
    return _softmax(
        [
            closed,
            of_open.masked_fill(~is_open, HIDDEN),
            exact.masked_fill(~_is_exact(call)[:, None, None], HIDDEN),
        ],
        [closed_value, call.open_value, call.exact_value],
        call.query.dtype,
    )


def _is_exact(call: PagedCall) -> Tensor:
    """(B, Q, N) bool: the exact tokens that each query sees."""
    queries, tokens = call.query.shape[2], call.exact_valid.shape[1]
    column = torch.arange(tokens, device=call.query.device)
    row = column[tokens - queries :, None]
    return (column <= row) & (column > row - call.delay) & call.exact_valid[:, None]


def step(call: StepCall) -> Tensor:
    """Folds what leaves the ring, in place, then attends from the new token.

    Returns:
        (B, H, 1, Dv) in the dtype of the query.
    """
    fold(call)
    return attend(folded(call))


def fold(call: StepCall, close: Callable[[StepCall, Tensor], None] | None = None) -> None:
    """Takes the new token into the ring and carries out the decision of the one that leaves.

    Args:
        call: changes in place.
        close: writes the open entries of the heads with True in (B, K) to their next free slots;
            None = the plain way, which reads back from the device which heads these are.
    """
    leaving, tail = _turn_ring(call), call.tail
    exists = tail.valid[:, None]  # (B, 1, 1)
    merges = (leaving.alpha > 0.5) & leaving.valid[:, None] & exists  # (B, K, 1)
    (close or _close)(call, (exists & ~merges)[..., 0])
    weight = torch.where(merges, tail.omega, 0.0) + leaving.omega
    if tail.size is not None and leaving.size is not None:
        tail.size.copy_(torch.where(merges, tail.size, 0.0) + leaving.size)
    for mean, new in ((tail.key, leaving.key), (tail.value, leaving.value)):
        new = new.to(mean.dtype)
        share = (leaving.omega / weight).to(mean.dtype)[..., None]
        mean.copy_(torch.where(merges[..., None], mean + (new - mean) * share, new))
    tail.omega.copy_(weight)
    for held, new in ((tail.cos, leaving.cos), (tail.sin, leaving.sin)):
        held.copy_(new)
    tail.valid.copy_(leaving.valid)


def _turn_ring(call: StepCall) -> Tokens:
    """Puts the new token where the oldest was, which is returned, N = 1."""
    new, ring, turn = call.new, call.ring, call.turn
    width = ring.valid.shape[1]
    if not width:
        return new
    leaving, fresh = {}, new.named()
    for name, held in ring.named().items():
        dim = token_dim(name)
        leaving[name] = held.index_select(dim, turn[None])
        token = fresh[name].to(held.dtype).expand_as(leaving[name])
        held.index_copy_(dim, turn[None], token)
    turn.add_(1).remainder_(width)
    return Tokens(**leaving)


def _close(call: StepCall, closes: Tensor) -> None:
    """Writes the open entry of every head with `closes` (B, K) to its next free slot."""
    batch, head = closes.nonzero(as_tuple=True)
    tail, size = call.tail, call.page_size
    key = tail.key[batch, head].to(call.new.key.dtype)
    key = rotate(key[:, None], tail.cos[batch], tail.sin[batch])[:, 0, 0]
    slot = call.lengths[batch, head]
    page, row = call.table[batch, head, slot // size].long(), slot % size
    key = (key if call.factors is None else key * call.factors).to(call.pages.dtype)
    bias, dim = open_bias(call), entry_key_dim(call)
    if bias is not None:
        key = torch.cat([key, bias[batch, head].to(key.dtype)], -1)
    key_view(call.pages, size, dim)[page, :, row] = key
    value = tail.value[batch, head, 0].to(call.pages.dtype)
    value_view(call.pages, size, dim)[page, row] = value
    call.lengths.add_(closes)


class PlainTorch:
    """Plain torch for every call on any device; what has no faster backend comes here.

    >>> BACKEND.available()
    (True, '')
    """

    name = "reference"

    def available(self) -> tuple[bool, str]:
        """Everywhere."""
        return True, ""

    def supports(self, call: ParallelCall | PagedCall | StepCall) -> tuple[bool, str]:
        """Every call."""
        return True, ""

    def parallel(self, call: ParallelCall) -> Tensor:
        """As `parallel` of this module, in blocks of rows that need less memory; differentiable."""
        return blocked.parallel(call)

    def attend(self, call: PagedCall) -> Tensor:
        """As `attend` of this module."""
        return attend(call)

    def step(self, call: StepCall) -> Tensor:
        """As `step` of this module."""
        return step(call)


BACKEND = PlainTorch()
