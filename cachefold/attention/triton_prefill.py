"""Prefill on a GPU: many new tokens against pages, their open entries and the exact tokens.

A tile takes some queries and all G heads that share a kv head, so that every entry it reads serves
G times as many rows. It goes over the entries that its last query sees, then over the band of
exact tokens; no buffer has a size of queries x entries. Legend and running softmax as in
`triton_decode`; Q queries, BQ of them in a tile of BM rows (row = query * G + head).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachefold.attention.call import PagedCall
from cachefold.attention.triton_decode import (
    attend_exact,
    attend_pages,
    load_vectors,
    score_units,
    start_open,
)
from cachefold.attention.triton_train_tiles import padded

TILES = {
    # (padded dim, bytes per number): (rows, columns, warps, tiles in flight)
    (64, 2): (128, 64, 8, 3),
    (128, 2): (64, 64, 4, 3),
    (256, 2): (64, 32, 8, 2),
    (64, 4): (32, 32, 4, 2),
    (128, 4): (32, 32, 8, 2),
    (256, 4): (16, 16, 4, 2),
}
"""The largest tiles that fit in the 99 KiB of shared memory of small cards and in registers, as
the compiler counts them for sm_80. Without tensor cores, float32 needs more registers."""


@triton.jit(do_not_specialize=["num_queries", "num_columns", "num_tokens"])
def prefill_fwd_kernel(
    p_query: tl.tensor, p_pages: tl.tensor, page_stride: int, p_table: tl.tensor, num_columns: int,
    p_visible: tl.tensor, p_open: tl.tuple, p_open_bias: tl.tensor, p_exact: tl.tuple,
    p_out: tl.tensor, num_queries: int, num_tokens: int, delay: int, scale: float, cap: float,
    CAPPED: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PS: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (B * K, tiles of queries)."""
    i_bk = tl.program_id(0).to(tl.int64)
    # The last queries see most: they start first, so that none of them is left alone at the end.
    o_query = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ
    i_batch = i_bk // K
    i_row, i_value = tl.arange(0, BM), tl.arange(0, BV)
    i_query = o_query + i_row // G
    m_row = (i_row < BQ * G) & (i_query < num_queries)
    o_row = (i_bk * G + i_row % G) * num_queries + i_query
    b_query = load_vectors(p_query, o_row * D, m_row, D, BD)  # [BM, BD]
    m_open = m_row & (
        tl.load(p_open[2] + i_batch * num_queries + i_query, mask=m_row, other=0) != 0
    )
    o_open = i_bk * num_queries + i_query
    b_key = load_vectors(p_open[0], o_open * D, m_open, D, BD)
    b_value = load_vectors(p_open[1], o_open * DV, m_open, DV, BV)
    peak, total, part = start_open(
        b_query, b_key, b_value, p_open_bias, o_open, m_open, scale, cap, CAPPED
    )

    last = tl.minimum(o_query + BQ, num_queries) - 1
    b_visible = tl.load(p_visible + o_open, mask=m_row, other=0).to(tl.int32)
    stop = tl.load(p_visible + i_bk * num_queries + last).to(tl.int32)
    peak, total, part = attend_pages(
        peak, total, part, b_query, b_visible, 0, stop, p_pages, p_table + i_bk * num_columns,
        page_stride, scale, cap, CAPPED, p_open_bias is not None, D, DV, PS, BD, BV, BN,
    )  # fmt: skip
    older = num_tokens - num_queries
    i_own = older + i_query
    peak, total, part = attend_exact(
        peak, total, part, b_query, i_own - delay + 1, i_own,
        tl.maximum(older + o_query - delay + 1, 0), tl.where(delay > 0, older + last + 1, 0),
        i_batch, i_bk, num_tokens, p_exact, None, None, scale, cap, CAPPED, D, DV, 0, BD, BV, BN,
        STAGES,
    )  # fmt: skip
    # A padding query may see nothing: 0, not NaN.
    out = part / tl.where(total > 0, total, 1.0)[:, None]
    m_out = m_row[:, None] & (i_value < DV)[None, :]
    tl.store(p_out + o_row[:, None] * DV + i_value[None, :], out, mask=m_out)


def tile(dim: int, itemsize: int, rows: int, groups: int) -> tuple[int, int, int, int]:
    """Rows, columns, warps and tiles in flight.

    Args:
        dim: the larger of D and Dv.
        itemsize: bytes of a number.
        rows: Q * G of the call: a short chunk takes a smaller tile.
        groups: G, at most the rows of a tile.

    >>> tile(64, 2, 3000, 3), tile(80, 2, 6, 3)
    ((128, 64, 8, 3), (16, 64, 4, 3))
    """
    most, columns, warps, stages = TILES[max(64, padded(dim)), itemsize]
    size = max(padded(groups), min(most, padded(rows)))
    # Cards of AMD have 64 KiB of shared memory and hold tiles in registers until they are needed.
    return size, columns, warps if size == most else 4, 2 if torch.version.hip else stages


def attend(call: PagedCall) -> Tensor:
    """Attends from new tokens to the entries in pages, the open entries and the exact tokens.

    Returns:
        (B, H, Q, Dv) in the dtype of the query, without gradient.

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
    batch, heads, num_queries, dim = call.query.shape
    kv_heads, num_tokens, value_dim = call.exact_value.shape[1:]
    groups = heads // kv_heads
    rows, columns, warps, stages = tile(
        max(dim, value_dim), call.query.element_size(), num_queries * groups, groups
    )
    scale, cap = score_units(call.scaling, call.softcap)
    opened = (call.open_key, call.open_value, call.open_valid)
    exact = (call.exact_key, call.exact_value, call.exact_valid)
    out = call.query.new_empty(batch, heads, num_queries, value_dim)
    prefill_fwd_kernel[batch * kv_heads, triton.cdiv(num_queries, rows // groups)](
        p_query=call.query.contiguous(), p_pages=call.pages, page_stride=call.pages.stride(0),
        p_table=call.table.contiguous(), num_columns=call.table.shape[2],
        p_visible=call.visible.contiguous(),
        p_open=tuple(tensor.contiguous() for tensor in opened),
        p_open_bias=None if call.open_bias is None else call.open_bias.contiguous(),
        p_exact=tuple(tensor.contiguous() for tensor in exact), p_out=out,
        num_queries=num_queries, num_tokens=num_tokens, delay=call.delay, scale=scale, cap=cap,
        CAPPED=call.softcap is not None, K=kv_heads, G=groups, D=dim, DV=value_dim,
        PS=call.page_size, BM=rows, BQ=rows // groups, BD=padded(dim), BV=padded(value_dim),
        BN=columns, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
