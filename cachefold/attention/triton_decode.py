"""Decode on a GPU: one query per request against ragged pages, split over the entries.

Each program takes one kv head, with the G queries that share it, and some of its entries: a long
head keeps many programs busy and each entry is read once. The programs leave running sums, which
a second kernel merges. How many programs there are follows from the width of the block table,
never from a length: nothing waits for the device, and a CUDA graph can hold the call.

Legend: B batch, H query heads, K kv heads, G = H / K, D key dim, Dv value dim, R rotary dim, N
exact tokens, C columns of the block table, S programs per head. In kernels: i_ index, o_ offset,
m_ mask, p_ pointer, b_ block; BM rows (padded queries), BN columns, BD and BV padded D and Dv. A
running softmax is three blocks: peak (BM,), the highest score; total (BM,), the sum of the weights
2^(score - peak); part (BM, BV), the values in the same sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachefold.attention.call import HIDDEN, PagedCall
from cachefold.attention.triton_train_tiles import padded

Vectors = tuple[Tensor, Tensor, Tensor]
"""Keys, values and which of them are valid."""
Angles = tuple[Tensor, Tensor]
"""Cosines and sines."""

FLOOR = tl.constexpr(HIDDEN)
"""Peak before any score; finite, so that 2^(FLOOR - FLOOR) is no NaN."""
PROGRAMS = 512
"""Programs of a call at full length: about four on each of the 108 to 148 multiprocessors of a
large card, which evens out heads of different lengths."""
MIN_SPLIT = 128
"""Entries that are worth a program of their own: with fewer, merging costs more than it saves."""
TILE_BYTES = 32 * 1024
"""Keys and values of one tile: three in flight hide the latency of memory and still fit in the
99 KiB of shared memory of small cards."""
FOUR_WARPS_BYTES = 256
"""A longer vector takes eight warps, or float32 spills registers."""
EXACT_COLUMNS = 16
"""Exact tokens per tile: they are rotated in registers, which a wider tile overflows."""
LOG2_E = tl.constexpr(math.log2(math.e))
"""Factor on biases: the kernels take powers of 2."""
CHUNK = tl.constexpr(16)
"""Sums that the merging kernel holds at once."""


@triton.jit
def capped(scores: tl.tensor, cap: float, CAPPED: tl.constexpr) -> tl.tensor:
    """The tanh cap; as a sigmoid, because the interpreter has no tanh."""
    if CAPPED:
        scores = cap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
    return scores


@triton.jit
def accumulate(
    peak: tl.tensor, total: tl.tensor, part: tl.tensor, scores: tl.tensor, b_value: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Takes columns into a running softmax; scores [BM, BN], -inf where not seen."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    decay = tl.exp2(peak - higher)
    weight = tl.exp2(scores - higher[:, None])
    total = total * decay + tl.sum(weight, 1)
    part = part * decay[:, None]
    part = tl.dot(weight.to(b_value.dtype), b_value, part, input_precision="ieee")
    return higher, total, part


@triton.jit
def load_vectors(
    p_vectors: tl.tensor,
    o_vectors: tl.tensor,
    m_vectors: tl.tensor,
    D: tl.constexpr,
    BD: tl.constexpr,
) -> tl.tensor:
    """Vectors at the offsets `o_vectors`, [BN, BD]."""
    i_dim = tl.arange(0, BD)
    m_dim = m_vectors[:, None] & (i_dim < D)[None, :]
    return tl.load(p_vectors + o_vectors[:, None] + i_dim[None, :], mask=m_dim, other=0.0)


@triton.jit
def load_rotated(
    p_vectors: tl.tensor, o_vectors: tl.tensor, m_vectors: tl.tensor, p_angles: tl.tuple,
    o_angles: tl.tensor, p_factors: tl.tensor, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Vectors, rotated by the angles at `o_angles` if there are any, and then times the factors."""
    i_dim = tl.arange(0, BD)
    b_vector = load_vectors(p_vectors, o_vectors, m_vectors, D, BD)
    if p_angles is not None:
        m_turned = m_vectors[:, None] & (i_dim < R)[None, :]
        o_angle = o_angles[:, None] + i_dim[None, :]
        b_cos = tl.load(p_angles[0] + o_angle, mask=m_turned, other=1.0).to(tl.float32)
        b_sin = tl.load(p_angles[1] + o_angle, mask=m_turned, other=0.0).to(tl.float32)
        i_partner = tl.where(i_dim < R // 2, i_dim + R // 2, i_dim - R // 2)
        o_partner = o_vectors[:, None] + i_partner[None, :]
        b_partner = tl.load(p_vectors + o_partner, mask=m_turned, other=0.0).to(tl.float32)
        b_partner = tl.where((i_dim < R // 2)[None, :], -b_partner, b_partner)
        b_vector = b_vector.to(tl.float32) * b_cos + b_partner * b_sin
    if p_factors is not None:
        b_factor = tl.load(p_factors + i_dim, mask=i_dim < D, other=0.0).to(tl.float32)
        b_vector = b_vector.to(tl.float32) * b_factor[None, :]
    return b_vector


@triton.jit
def start_open(
    b_query: tl.tensor, b_key: tl.tensor, b_value: tl.tensor, p_bias: tl.tensor, o_bias: tl.tensor,
    m_open: tl.tensor, scale: float, cap: float, CAPPED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Running softmax of the open entry of each row alone; keys [BM, BD], values [BM, BV]."""
    scores = tl.sum(b_query.to(tl.float32) * b_key.to(tl.float32), 1) * scale
    scores = capped(scores, cap, CAPPED)
    if p_bias is not None:
        scores += tl.load(p_bias + o_bias, mask=m_open, other=0.0) * LOG2_E
    peak = tl.where(m_open, scores, FLOOR)
    total = tl.where(m_open, 1.0, 0.0)
    return peak, total, b_value.to(tl.float32)


@triton.jit
def attend_pages(
    peak: tl.tensor, total: tl.tensor, part: tl.tensor, b_query: tl.tensor, b_visible: tl.tensor,
    start: int, stop: int, p_pages: tl.tensor, p_table: tl.tensor, page_stride: int, scale: float,
    cap: float, CAPPED: tl.constexpr, BIASED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes in the entries [start, stop) of one head; row r sees the first b_visible[r] of it.

    If they have a bias, it is one more channel of the keys.
    """
    VALUES: tl.constexpr = PS * (D + BIASED)
    i_dim = tl.arange(0, BD)
    i_value = tl.arange(0, BV)
    for o_entry in tl.range(start, stop, BN):
        i_entry = o_entry + tl.arange(0, BN)
        i_slot = i_entry % PS
        # Whole pages, or the compiler could not load the entries of a channel side by side.
        m_page = i_entry // PS < tl.cdiv(stop, PS)
        i_page = tl.load(p_table + i_entry // PS, mask=m_page, other=0)
        i_page = tl.max_constancy(i_page, PS if PS < BN else BN)
        o_page = i_page.to(tl.int64) * page_stride
        p_key = p_pages + o_page[None, :] + i_dim[:, None] * PS + i_slot[None, :]
        m_key = m_page[None, :] & (i_dim < D)[:, None]
        b_key = tl.load(p_key, mask=m_key, other=0.0).to(b_query.dtype)  # [BD, BN]
        scores = tl.dot(b_query, b_key, input_precision="ieee") * scale
        scores = capped(scores, cap, CAPPED)
        if BIASED:
            p_bias = p_pages + o_page + PS * D + i_slot
            b_bias = tl.load(p_bias, mask=m_page, other=0.0).to(tl.float32)
            scores += b_bias[None, :] * LOG2_E
        scores = tl.where(i_entry[None, :] < b_visible[:, None], scores, float("-inf"))
        p_value = p_pages + o_page[:, None] + VALUES + i_slot[:, None] * DV + i_value[None, :]
        m_value = (i_entry < stop)[:, None] & (i_value < DV)[None, :]
        b_value = tl.load(p_value, mask=m_value, other=0.0)  # [BN, BV]
        peak, total, part = accumulate(peak, total, part, scores, b_value)
    return peak, total, part


@triton.jit
def attend_exact(
    peak: tl.tensor, total: tl.tensor, part: tl.tensor, b_query: tl.tensor, b_first: tl.tensor,
    b_last: tl.tensor, start: int, stop: int, i_batch: tl.tensor, i_bk: tl.tensor,
    num_tokens: int, p_exact: tl.tuple, p_angles: tl.tuple, p_factors: tl.tensor, scale: float,
    cap: float, CAPPED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes in the exact tokens [start, stop); row r sees those from b_first[r] to b_last[r]."""
    for o_token in tl.range(start, stop, BN, num_stages=STAGES):
        i_token = o_token + tl.arange(0, BN)
        o_token_b = i_batch * num_tokens + i_token
        o_token_bk = i_bk * num_tokens + i_token
        m_token = tl.load(p_exact[2] + o_token_b, mask=i_token < stop, other=0) != 0
        b_key = load_rotated(
            p_exact[0], o_token_bk * D, m_token, p_angles, o_token_b * R, p_factors, D, R, BD
        )
        b_key = tl.trans(b_key.to(b_query.dtype))  # [BD, BN]
        scores = tl.dot(b_query, b_key, input_precision="ieee") * scale
        m_seen = (i_token[None, :] >= b_first[:, None]) & (i_token[None, :] <= b_last[:, None])
        scores = tl.where(m_seen & m_token[None, :], capped(scores, cap, CAPPED), float("-inf"))
        b_value = load_vectors(p_exact[1], o_token_bk * DV, m_token, DV, BV)
        peak, total, part = accumulate(peak, total, part, scores, b_value)
    return peak, total, part


@triton.jit(do_not_specialize=["num_columns", "num_tokens"])
def decode_fwd_kernel(
    p_query: tl.tensor, p_query_angles: tl.tuple, query_angle_stride: int, p_pages: tl.tensor,
    page_stride: int, p_table: tl.tensor, num_columns: int, p_lengths: tl.tensor, p_open: tl.tuple,
    p_open_angles: tl.tuple, p_open_bias: tl.tensor, p_exact: tl.tuple, p_exact_angles: tl.tuple,
    num_tokens: int, p_factors: tl.tensor, p_peak: tl.tensor, p_total: tl.tensor,
    p_part: tl.tensor, scale: float, cap: float, CAPPED: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, PS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    BE: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (B * K, S): program s takes SPLIT entries, the last one the open entry and the ring."""
    i_bk = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    i_batch = i_bk // K
    length = tl.load(p_lengths + i_bk).to(tl.int32)
    if (i_split < num_splits - 1) & (i_split * SPLIT >= length):
        return
    i_row, i_value = tl.arange(0, BM), tl.arange(0, BV)
    m_row = i_row < G
    o_row = i_bk * G + i_row
    o_angle = i_batch * query_angle_stride + i_row * 0
    b_query = load_rotated(
        p_query, o_row * D, m_row, p_query_angles, o_angle, p_factors, D, R, BD
    ).to(p_query.dtype.element_ty)  # [BM, BD]
    if i_split == num_splits - 1:
        o_open, o_angle = i_bk + i_row * 0, i_batch * R + i_row * 0
        m_open = m_row & (tl.load(p_open[2] + i_batch + i_row * 0) != 0)
        b_key = load_rotated(
            p_open[0], o_open * D, m_open, p_open_angles, o_angle, p_factors, D, R, BD
        )
        b_value = load_vectors(p_open[1], o_open * DV, m_open, DV, BV)
        peak, total, part = start_open(
            b_query, b_key, b_value, p_open_bias, o_open, m_open, scale, cap, CAPPED
        )
        peak, total, part = attend_exact(
            peak, total, part, b_query, i_row * 0, i_row * 0 + num_tokens, 0, num_tokens, i_batch,
            i_bk, num_tokens, p_exact, p_exact_angles, p_factors, scale, cap, CAPPED, D, DV, R,
            BD, BV, BE, 1,
        )  # fmt: skip
    else:
        peak = tl.full([BM], FLOOR, tl.float32)
        total = tl.zeros([BM], tl.float32)
        part = tl.zeros([BM, BV], tl.float32)
        stop = tl.minimum((i_split + 1) * SPLIT, length)
        peak, total, part = attend_pages(
            peak, total, part, b_query, i_row * 0 + length, i_split * SPLIT, stop, p_pages,
            p_table + i_bk * num_columns, page_stride, scale, cap, CAPPED, p_open_bias is not None,
            D, DV, PS, BD, BV, BN,
        )  # fmt: skip
    o_sum = o_row * num_splits + i_split
    tl.store(p_peak + o_sum, peak, mask=m_row)
    tl.store(p_total + o_sum, total, mask=m_row)
    m_part = m_row[:, None] & (i_value < DV)[None, :]
    tl.store(p_part + o_sum[:, None] * DV + i_value[None, :], part, mask=m_part)


@triton.jit(do_not_specialize=["num_splits", "width"])
def combine_fwd_kernel(
    p_peak: tl.tensor, p_total: tl.tensor, p_part: tl.tensor, p_lengths: tl.tensor,
    p_turn: tl.tensor, p_out: tl.tensor, num_splits: int, width: int, G: tl.constexpr,
    DV: tl.constexpr, SPLIT: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (B * H): merges the running sums of the programs that had entries, and of the last."""
    i_row = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(tl.load(p_lengths + i_row // G), SPLIT)
    o_row = i_row * num_splits
    i_any = tl.arange(0, BS)
    m_any = (i_any < used) | (i_any == num_splits - 1)
    highest = tl.max(tl.load(p_peak + o_row + i_any, mask=m_any, other=FLOOR), 0)
    i_value = tl.arange(0, BV)
    total = tl.zeros([CHUNK], tl.float32)
    part = tl.zeros([BV], tl.float32)
    for o_split in tl.range(0, num_splits, CHUNK):
        i_split = o_split + tl.arange(0, CHUNK)
        m_split = (i_split < used) | (i_split == num_splits - 1)
        peak = tl.load(p_peak + o_row + i_split, mask=m_split, other=float("-inf"))
        weight = tl.exp2(peak - highest)
        total += weight * tl.load(p_total + o_row + i_split, mask=m_split, other=0.0)
        p_parts = p_part + (o_row + i_split)[:, None] * DV + i_value[None, :]
        m_part = m_split[:, None] & (i_value < DV)[None, :]
        part += tl.sum(weight[:, None] * tl.load(p_parts, mask=m_part, other=0.0), 0)
    # A padding query may see nothing: 0, not NaN.
    total = tl.sum(total, 0)
    out = part / tl.where(total > 0, total, 1.0)
    tl.store(p_out + i_row * DV + i_value, out, mask=i_value < DV)
    if p_turn is not None:
        # Here, because all programs of the kernels before read it.
        if i_row == 0:
            tl.store(p_turn, (tl.load(p_turn) + 1) % width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """One query per request and all it sees. Every tensor is contiguous."""

    query: Tensor
    """(B, H, 1, D)"""
    pages: Tensor
    page_size: int
    table: Tensor
    """(B, K, C) int32"""
    lengths: Tensor
    """(B, K) int64"""
    open: Vectors
    """(B, K, 1, D), (B, K, 1, Dv) and (B, 1): the entry that is open."""
    open_bias: Tensor | None
    """(B, K, 1) float32 on its score; then entries in pages have a bias too. None = 0."""
    exact: Vectors
    """(B, K, N, D), (B, K, N, Dv) and (B, N): the query sees all that are valid."""
    scaling: float
    softcap: float | None
    query_angles: Angles | None = None
    """(B, 1, R) or (1, 1, R) each; without angles all is rotated and has its factors."""
    open_angles: Angles | None = None
    """(B, 1, R) each."""
    exact_angles: Angles | None = None
    """(B, N, R) each."""
    factors: Tensor | None = None
    """(D,) factors on rotated queries and keys; None = 1."""
    turn: Tensor | None = None
    """() int64, moves one token on around N when all is read."""


def batch_stride(tensor: Tensor) -> int:
    """Numbers from one request to the next; none where all requests share one.

    >>> batch_stride(torch.zeros(2, 3)), batch_stride(torch.zeros(1, 3))
    (3, 0)
    """
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def score_units(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Factor on scores and cap, in units of log 2: the kernels take powers of 2.

    >>> [round(x, 4) for x in score_units(1.0, None)], [round(x, 4) for x in score_units(1.0, 2.0)]
    ([1.4427, 0.0], [0.5, 2.8854])
    """
    log2 = math.log2(math.e)
    return (scaling * log2, 0.0) if softcap is None else (scaling / softcap, softcap * log2)


def tile_entries(dim: int, itemsize: int) -> int:
    """Entries per tile: `TILE_BYTES` of them, 16 (least of `tl.dot`) to 128 (more idle at the end).

    Args:
        dim: the larger of D and Dv.
        itemsize: bytes of a number.

    >>> tile_entries(64, 2), tile_entries(80, 2), tile_entries(256, 4)
    (128, 64, 16)
    """
    return max(16, min(128, TILE_BYTES // (2 * padded(dim) * itemsize)))


def split_entries(heads: int, capacity: int) -> int:
    """Entries of one program, a power of two that gives about `PROGRAMS` programs.

    Args:
        heads: B * K.
        capacity: entries that the block table of a head has room for.

    >>> split_entries(8, 2048), split_entries(64, 8192), split_entries(8, 131072)
    (128, 1024, 2048)
    """
    return max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(heads * capacity, PROGRAMS)))


def attend(call: PagedCall) -> Tensor:
    """Attends from one query per request.

    Args:
        call: with Q = 1.

    Returns:
        (B, H, 1, Dv) in the dtype of the query, without gradient.

    The second of two entries is not visible yet:

    >>> one = torch.ones(1, 1, 1, 1)
    >>> pages = torch.cat([torch.ones(1, 16), 5 * torch.ones(1, 16)], 1)
    >>> call = PagedCall(
    ...     query=one, pages=pages, page_size=16, table=torch.zeros(1, 1, 1, dtype=torch.int32),
    ...     visible=torch.ones(1, 1, 1, dtype=torch.int64), open_key=one, open_value=one,
    ...     open_valid=one[0, 0] > 0, exact_key=one, exact_value=one, exact_valid=one[0, 0] > 0,
    ...     delay=1, scaling=1.0)
    >>> attend(call).item()  # of values 5, 1 and 1
    2.3333332538604736
    """
    exact = (call.exact_key, call.exact_value, call.exact_valid[:, None])
    hidden = max(call.exact_key.shape[2] - call.delay, 0)
    key, value, valid = (tensor[:, :, hidden:].contiguous() for tensor in exact)
    opened = (call.open_key, call.open_value, call.open_valid)
    open_key, open_value, open_valid = (tensor.contiguous() for tensor in opened)
    open_bias = None if call.open_bias is None else call.open_bias.contiguous()
    return decode(
        Columns(
            query=call.query.contiguous(), pages=call.pages, page_size=call.page_size,
            table=call.table.contiguous(), lengths=call.visible.contiguous(),
            open=(open_key, open_value, open_valid), open_bias=open_bias,
            exact=(key, value, valid[:, 0]), scaling=call.scaling, softcap=call.softcap,
        )
    )  # fmt: skip


def decode(columns: Columns) -> Tensor:
    """Attends from one query per request to all it sees: two launches.

    Returns:
        (B, H, 1, Dv) in the dtype of the query. `attend` has an example.
    """
    batch, heads = columns.query.shape[:2]
    kv_heads, capacity = columns.table.shape[1], columns.table.shape[2] * columns.page_size
    num_tokens, value_dim = columns.exact[1].shape[2:]
    split = split_entries(batch * kv_heads, capacity)
    num_splits = triton.cdiv(capacity, split) + 1
    peak = columns.query.new_empty(batch, heads, num_splits, dtype=torch.float32)
    total, part = torch.empty_like(peak), peak.new_empty(*peak.shape, value_dim)
    out = columns.query.new_empty(batch, heads, 1, value_dim)
    decode_fwd_kernel[batch * kv_heads, num_splits](
        **_arguments(columns), p_peak=peak, p_total=total, p_part=part, SPLIT=split, num_stages=3,
    )  # fmt: skip
    combine_fwd_kernel[(batch * heads,)](
        peak, total, part, columns.lengths, columns.turn, out, num_splits, num_tokens,
        G=heads // kv_heads, DV=value_dim, SPLIT=split, BS=padded(num_splits),
        BV=padded(value_dim), num_warps=2,
    )  # fmt: skip
    return out


def _arguments(columns: Columns) -> dict[str, Any]:
    """Arguments of `decode_fwd_kernel` that do not depend on the split."""
    dim, kv_heads = columns.query.shape[3], columns.table.shape[1]
    groups = columns.query.shape[1] // kv_heads
    num_tokens, value_dim = columns.exact[1].shape[2:]
    scale, cap = score_units(columns.scaling, columns.softcap)
    angles, itemsize = columns.query_angles, columns.pages.element_size()
    return dict(
        p_query=columns.query, p_query_angles=angles,
        query_angle_stride=0 if angles is None else batch_stride(angles[0]),
        p_pages=columns.pages, page_stride=columns.pages.stride(0), p_table=columns.table,
        num_columns=columns.table.shape[2], p_lengths=columns.lengths, p_open=columns.open,
        p_open_angles=columns.open_angles, p_open_bias=columns.open_bias, p_exact=columns.exact,
        p_exact_angles=columns.exact_angles, num_tokens=num_tokens, p_factors=columns.factors,
        scale=scale, cap=cap, CAPPED=columns.softcap is not None, K=kv_heads, G=groups, D=dim,
        DV=value_dim, R=0 if angles is None else angles[0].shape[-1], PS=columns.page_size,
        BM=padded(groups), BD=padded(dim), BV=padded(value_dim), BE=EXACT_COLUMNS,
        BN=tile_entries(max(dim, value_dim), itemsize),
        num_warps=4 if padded(max(dim, value_dim)) * itemsize <= FOUR_WARPS_BYTES else 8,
    )  # fmt: skip
