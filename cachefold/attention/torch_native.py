"""The backend `torch`: plain torch operations, for whatever torch runs on (CPU, CUDA, MPS, XLA).

One query per head, or a short chunk, is attended with static shapes and no number read back from
the device, which `torch.compile(fullgraph=True)` takes. A long prefill goes head by head and by
blocks of rows: each block reads the entries that its last query sees, and no others.

Legend as in `call`; W queries of a block of the band, see `torch_rows`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from cachefold.attention import blocked
from cachefold.attention.call import PagedCall, ParallelCall, StepCall, entry_key_dim, folded
from cachefold.attention.torch_fold import fold
from cachefold.attention.torch_rows import attend_rows, prepared
from cachefold.core.pages import key_view, slots, value_view

QUERY_ROWS = 768
"""Rows of scores at a time in a long prefill, those of all query heads of a kv head together."""

BAND_ROWS = 32
"""Fewest queries of a block of the band. More see fewer copies of the exact keys, and hide more."""

SCORES = 1 << 20
"""Scores up to which a chunk is attended at once, for all heads together and without blocks."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number, to see floats as bits."""


class TorchNative:
    """Torch operations that every device has.

    >>> BACKEND.available()
    (True, '')
    """

    name = "torch"

    def available(self) -> tuple[bool, str]:
        """Everywhere."""
        return True, ""

    def supports(self, call: ParallelCall | PagedCall | StepCall) -> tuple[bool, str]:
        """Every call."""
        return True, ""

    def parallel(self, call: ParallelCall) -> Tensor:
        """See `blocked.parallel`."""
        return blocked.parallel(call)

    def attend(self, call: PagedCall) -> Tensor:
        """See `attend`."""
        return attend(call)

    def step(self, call: StepCall) -> Tensor:
        """See `step`."""
        return step(call)


BACKEND = TorchNative()


def attend(call: PagedCall) -> Tensor:
    """Attends from new tokens to the entries in pages, the open entries and the exact tokens.

    Memory beside the output is O(N + S): the entries of one head and the scores of a block.

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
    call = prepared(call)
    batch, heads, queries, _ = call.query.shape
    columns = call.table.shape[2] * call.page_size + call.exact_key.shape[2]
    small = batch * heads * queries * columns <= SCORES
    return (_at_once(call) if queries == 1 or small else _by_blocks(call)).flatten(1, 2)


def step(call: StepCall) -> Tensor:
    """Folds what leaves the ring, in place, then attends from the new token.

    Reads every page that the table lists, so that no shape depends on what was decided.

    Returns:
        (B, H, 1, Dv) in the dtype of the query.

    A first token sees itself:

    >>> from cachefold.core.tokens import Tokens
    >>> def token(x, valid):
    ...     vector, turn = torch.full((1, 1, 1, 2), x), torch.ones(1, 1, 2)
    ...     one = torch.ones(1, 1, 1)
    ...     return Tokens(
    ...         vector, vector.clone(), turn, 0 * turn, 0 * one, one, torch.tensor([[valid]]))
    >>> step(StepCall(
    ...     query=torch.ones(1, 1, 1, 2), new=token(3.0, True), ring=token(0.0, False),
    ...     turn=torch.tensor(0), tail=token(0.0, False), pages=torch.zeros(1, 64), page_size=16,
    ...     table=torch.zeros(1, 1, 1, dtype=torch.int32),
    ...     lengths=torch.zeros(1, 1, dtype=torch.int64), scaling=1.0)).flatten().tolist()
    [3.0, 3.0]
    """
    fold(call)
    return attend(folded(call))


def _at_once(call: PagedCall) -> Tensor:
    """All queries of all heads together, (B, K, G, Q, Dv); no shape depends on a number."""
    key, value = _entries(call, call.table.shape[2])
    exists = slots(call.visible[..., -1], call.table.shape[2], call.page_size)
    # Pages hold garbage beyond the length, NaN included, and 0 * NaN must not reach the sum.
    # As integers the product is 0, for a tenth of the time of masked_fill.
    bits = INTEGERS[value.element_size()]
    value = (value.view(bits) * exists[..., None].to(bits)).view(value.dtype)
    queries = call.query.shape[2]
    return attend_rows(call, key, value, rows=(0, queries), common=0, width=queries)[:, :, 0]


def _by_blocks(call: PagedCall) -> Tensor:
    """Head by head and a block of rows at a time, (B, K, G, Q, Dv)."""
    batch, kv_heads, queries = call.visible.shape
    groups = call.query.shape[1] // kv_heads
    shape = (batch, kv_heads, groups, queries, call.open_value.shape[-1])
    out = torch.empty(shape, dtype=call.query.dtype, device=call.query.device)
    most_rows = max(QUERY_ROWS // groups, 1)
    width = min(max(BAND_ROWS, call.delay), most_rows)
    blocks = _blocks(queries, width, most_rows)
    ends = torch.tensor([(start, stop - 1) for start, stop in blocks], device=out.device)
    counts = call.visible[:, :, ends].tolist()
    for b, k in itertools.product(range(batch), range(kv_heads)):
        head = _one_head(call, b, k, groups)
        key, value = _entries(head, -(-counts[b][k][-1][1] // call.page_size))
        for (start, stop), (common, most) in zip(blocks, counts[b][k], strict=True):
            part = attend_rows(
                head, key[..., :most], value[:, :, :most],
                rows=(start, stop), common=common, width=min(width, stop - start),
            )  # fmt: skip
            rows = out[b, k, :, start:stop].unflatten(1, part.shape[2:5:2])
            rows.copy_(part[0, 0].transpose(0, 1))
    return out


def _blocks(queries: int, width: int, most_rows: int) -> list[tuple[int, int]]:
    """[start, stop) of the blocks of rows: multiples of W, then what is left."""
    whole, rows = queries - queries % width, most_rows // width * width
    blocks = [(start, min(start + rows, whole)) for start in range(0, whole, rows)]
    return blocks + [(whole, queries)] * (whole < queries)


def _one_head(call: PagedCall, b: int, k: int, groups: int) -> PagedCall:
    """The part of request b and kv head k."""
    one, head = slice(b, b + 1), slice(k, k + 1)
    return replace(
        call,
        query=call.query[one, k * groups : (k + 1) * groups],
        table=call.table[one, head], visible=call.visible[one, head],
        open_key=call.open_key[one, head], open_value=call.open_value[one, head],
        open_bias=None if call.open_bias is None else call.open_bias[one, head],
        open_valid=call.open_valid[one], exact_key=call.exact_key[one, head],
        exact_value=call.exact_value[one, head], exact_valid=call.exact_valid[one],
    )  # fmt: skip


def _entries(call: PagedCall, columns: int) -> tuple[Tensor, Tensor]:
    """Copies out the first pages of every head: keys (B, K, D, S) and values (B, K, S, Dv).

    Keys have D + 1 channels where entries have a bias.
    """
    size, dim = call.page_size, entry_key_dim(call)
    table = call.table[..., :columns]
    shape, pages = table.shape, table.clamp(min=0).flatten()
    # Over flat rows, which index_select copies faster than pages of rows.
    key = key_view(call.pages, size, dim).flatten(1).index_select(0, pages)
    value = value_view(call.pages, size, dim).flatten(1).index_select(0, pages)
    key = key.unflatten(1, (dim, size)).unflatten(0, shape).transpose(2, 3).flatten(3)
    value = value.unflatten(1, (size, -1)).unflatten(0, shape).flatten(2, 3)
    return key.to(call.query.dtype), value.to(call.query.dtype)
