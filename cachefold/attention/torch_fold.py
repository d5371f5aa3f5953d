"""`reference.fold` with static shapes: no number is read back from the device.

So a step can be compiled as one graph, and captured in a CUDA graph. Legend as in `call`; M = B x K
heads of the batch, E numbers of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.attention import reference
from cachefold.attention.call import StepCall, entry_key_dim, open_bias
from cachefold.core.pages import key_view, value_view
from cachefold.core.rotary import rotate


def fold(call: StepCall) -> None:
    """Takes the new token into the ring and carries out the decision of the one that leaves.

    The first token of a text waits in a ring of one; the next one opens an entry with it:

    >>> from cachefold.core.tokens import Tokens
    >>> def token(x, valid):
    ...     vector, turn = torch.full((1, 1, 1, 2), x), torch.ones(1, 1, 2)
    ...     one = torch.ones(1, 1, 1)
    ...     return Tokens(
    ...         vector, vector.clone(), turn, 0 * turn, 0 * one, one, torch.tensor([[valid]]))
    >>> ring, tail = token(0.0, False), token(0.0, False)
    >>> for x in (5.0, 7.0):
    ...     fold(StepCall(
    ...         query=torch.ones(1, 1, 1, 2), new=token(x, True), ring=ring,
    ...         turn=torch.tensor(0), tail=tail, pages=torch.zeros(1, 64), page_size=16,
    ...         table=torch.zeros(1, 1, 1, dtype=torch.int32),
    ...         lengths=torch.zeros(1, 1, dtype=torch.int64), scaling=1.0))
    >>> ring.key[..., 0].item(), tail.key[..., 0].item(), tail.valid.item()
    (7.0, 5.0, True)
    """
    reference.fold(call, _close)


def _close(call: StepCall, closes: Tensor) -> None:
    """Writes the open entry of every head with `closes` (B, K) to its next free slot.

    Every head writes. One that closes nothing repeats the write of the first that does, and when
    none does, all write back what they read. So no slot of another entry changes, no two heads
    write different numbers to one place, and no page is needed for a head that closes nothing.
    """
    if not call.table.numel() or not len(call.pages):  # not a page yet: nothing can close
        return
    flat = closes.flatten()
    heads = torch.arange(flat.shape[0], device=flat.device)
    first = flat.int().argmax()
    source = torch.where(flat, heads, first)
    page, row = _next_slots(call)
    page, offsets = page[source, None], _offsets(call)[row[source]]
    entry = torch.where(flat.any(), _entries(call)[source], call.pages[page, offsets])
    call.pages.index_put_((page, offsets), entry)
    call.lengths.add_(closes)


def _next_slots(call: StepCall) -> tuple[Tensor, Tensor]:
    """Page and row of the next free slot of every head, (M,) int64.

    Where a head has no page, -1 of the table is the last page: it closes nothing, so nothing of
    its own is written.
    """
    size, columns = call.page_size, call.table.shape[2]
    column = (call.lengths // size).clamp(max=columns - 1)
    page = call.table.gather(2, column[..., None])
    return page.long().flatten(), (call.lengths % size).flatten()


def _offsets(call: StepCall) -> Tensor:
    """(page_size, D + Dv) int64, where in a page the numbers of an entry are."""
    size, dim = call.page_size, entry_key_dim(call)
    places = torch.arange(call.pages.shape[1], device=call.pages.device)[None]
    return torch.cat([key_view(places, size, dim)[0].T, value_view(places, size, dim)[0]], 1)


def _entries(call: StepCall) -> Tensor:
    """The open entries as they lie in pages, (M, D + Dv)."""
    tail = call.tail
    key = rotate(tail.key.to(call.new.key.dtype), tail.cos, tail.sin)
    key = key if call.factors is None else key * call.factors
    bias = open_bias(call)
    parts = [key, tail.value] if bias is None else [key, bias[..., None], tail.value]
    return torch.cat([part.to(call.pages.dtype) for part in parts], -1).flatten(0, 2)
