"""A decode step on a GPU: `reference.fold` in one launch, then the decode kernels.

Nothing waits for the device and no size depends on a length, so a CUDA graph can hold a step.
Legend: B batch, H query heads, K kv heads, D key dim, Dv value dim, R rotary dim, W tokens of the
ring, C columns of the block table. In kernels: i_ index, o_ offset, m_ mask, p_ pointer, b_ block;
BK, BD, BV and BR padded K, D, Dv and R; tokens are tuples in the order of the fields of `Tokens`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachefold.attention.call import StepCall
from cachefold.attention.triton_decode import (
    Columns,
    batch_stride,
    decode,
    load_rotated,
)
from cachefold.attention.triton_train_tiles import padded
from cachefold.core.tokens import Tokens

NUMBERS = 8
"""Numbers of each tensor per thread: a dozen tensors are held at once, in 255 registers."""


@triton.jit
def token_offsets(
    i_batch: tl.tensor, i_slot: tl.tensor, width: int, angle_stride: int, K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BR: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Where numbers per head, keys, values, angles and `valid` (once per head) of a token are."""
    o_head = (i_batch * K + tl.arange(0, BK)) * width + i_slot
    o_key = o_head[:, None] * D + tl.arange(0, BD)[None, :]
    o_value = o_head[:, None] * DV + tl.arange(0, BV)[None, :]
    o_angle = i_batch * angle_stride + i_slot * R + tl.arange(0, BR)
    o_valid = i_batch * width + i_slot + tl.arange(0, BK) * 0
    return o_head, o_key, o_value, o_angle, o_valid


@triton.jit
def load_token(p_token: tl.tuple, o_token: tl.tuple, m_token: tl.tuple) -> tuple[tl.tensor, ...]:
    """Key, value, cos, sin, alpha, omega and valid of one token, for all heads of a request."""
    return (
        tl.load(p_token[0] + o_token[1], mask=m_token[1], other=0.0).to(tl.float32),
        tl.load(p_token[1] + o_token[2], mask=m_token[2], other=0.0).to(tl.float32),
        tl.load(p_token[2] + o_token[3], mask=m_token[3], other=0.0),
        tl.load(p_token[3] + o_token[3], mask=m_token[3], other=0.0),
        tl.load(p_token[4] + o_token[0], mask=m_token[0], other=0.0).to(tl.float32),
        tl.load(p_token[5] + o_token[0], mask=m_token[0], other=1.0).to(tl.float32),
        tl.load(p_token[6] + o_token[4]) != 0,
    )


@triton.jit
def store_token(
    p_token: tl.tuple, o_token: tl.tuple, m_token: tl.tuple,
    token: tl.tuple, HAS_ALPHA: tl.constexpr,
) -> None:  # fmt: skip
    """Writes what `load_token` reads."""
    tl.store(p_token[0] + o_token[1], token[0], mask=m_token[1])
    tl.store(p_token[1] + o_token[2], token[1], mask=m_token[2])
    tl.store(p_token[2] + o_token[3], token[2], mask=m_token[3])
    tl.store(p_token[3] + o_token[3], token[3], mask=m_token[3])
    if HAS_ALPHA:
        tl.store(p_token[4] + o_token[0], token[4], mask=m_token[0])
    tl.store(p_token[5] + o_token[0], token[5], mask=m_token[0])
    tl.store(p_token[6] + o_token[4], token[6])


@triton.jit
def load_size(p_token: tl.tuple, o_token: tl.tuple, m_token: tl.tuple) -> tl.tensor:
    """How many tokens one stands for in each head."""
    return tl.load(p_token[7] + o_token[0], mask=m_token[0], other=1.0).to(tl.float32)


@triton.jit
def size_bias(size: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """`merging.size_bias` of one entry of every head."""
    return weight * tl.log(tl.maximum(size, 1.0))  # a slot that holds nothing may have 0


@triton.jit
def store_entry(
    p_pages: tl.tensor, page_stride: int, p_table: tl.tensor, b_slot: tl.tensor, b_key: tl.tensor,
    b_bias: tl.tensor, b_value: tl.tensor, closes: tl.tensor, D: tl.constexpr, DV: tl.constexpr,
    PS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """Writes an entry of every head that closes one to slot `b_slot` of its table row.

    A bias, if there is one, is one more channel of the keys.
    """
    BIASED: tl.constexpr = b_bias is not None
    i_dim, i_value = tl.arange(0, BD), tl.arange(0, BV)
    i_page = tl.load(p_table + b_slot // PS, mask=closes, other=0).to(tl.int64)
    o_page, i_entry = (i_page * page_stride)[:, None], (b_slot % PS)[:, None]
    o_key = o_page + i_dim[None, :] * PS + i_entry
    tl.store(p_pages + o_key, b_key, mask=closes[:, None] & (i_dim < D)[None, :])
    if BIASED:
        tl.store(p_pages + i_page * page_stride + PS * D + b_slot % PS, b_bias, mask=closes)
    o_value = o_page + PS * (D + BIASED) + i_entry * DV + i_value[None, :]
    tl.store(p_pages + o_value, b_value, mask=closes[:, None] & (i_value < DV)[None, :])


@triton.jit(do_not_specialize=["num_columns"])
def fold_fwd_kernel(
    p_new: tl.tuple, new_angle_stride: int, p_ring: tl.tuple, ring_angle_stride: int, width: int,
    p_turn: tl.tensor, p_tail: tl.tuple, p_pages: tl.tensor, page_stride: int, p_table: tl.tensor,
    num_columns: int, p_lengths: tl.tensor, p_factors: tl.tensor, p_size_weight: tl.tensor,
    p_open_bias: tl.tensor, HAS_RING: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, R: tl.constexpr, PS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BR: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (B,): all heads of a request in one program, because they share cos, sin and valid.

    Without a ring, `p_ring` is the new token, which leaves at once. With `p_size_weight`, (B, K)
    numbers go to `p_open_bias`: what the scores of the open entries then rise by.
    """
    i_batch = tl.program_id(0).to(tl.int64)
    m_head = tl.arange(0, BK) < K
    m_key = m_head[:, None] & (tl.arange(0, BD) < D)[None, :]
    m_value = m_head[:, None] & (tl.arange(0, BV) < DV)[None, :]
    m_token = (m_head, m_key, m_value, tl.arange(0, BR) < R)
    i_slot = tl.load(p_turn) if HAS_RING else i_batch * 0
    o_leaving = token_offsets(
        i_batch, i_slot, width, ring_angle_stride, K, D, DV, R, BK, BD, BV, BR
    )
    leaving = load_token(p_ring, o_leaving, m_token)
    o_new = token_offsets(i_batch, i_batch * 0, 1, new_angle_stride, K, D, DV, R, BK, BD, BV, BR)
    new = load_token(p_new, o_new, m_token)
    o_tail = token_offsets(i_batch, i_batch * 0, 1, R, K, D, DV, R, BK, BD, BV, BR)
    tail = load_token(p_tail, o_tail, m_token)
    o_head = o_tail[0]
    b_key = load_rotated(
        p_tail[0], o_head * D, m_head, (p_tail[2], p_tail[3]), i_batch * R + o_head * 0,
        p_factors, D, R, BD,
    )  # [BK, BD]  # fmt: skip
    slot = tl.load(p_lengths + o_head, mask=m_head, other=0)

    exists, merges = tail[6], (leaving[4] > 0.5) & leaving[6] & tail[6]
    closes = m_head & exists & (merges == 0)
    weight = tl.where(merges, tail[5], 0.0) + leaving[5]
    share = tl.where(merges, leaving[5] / weight, 1.0)[:, None]
    mean_key = tl.where(merges[:, None], tail[0] + (leaving[0] - tail[0]) * share, leaving[0])
    mean_value = tl.where(merges[:, None], tail[1] + (leaving[1] - tail[1]) * share, leaving[1])
    b_bias = None
    if p_size_weight is not None:
        b_weight = tl.load(p_size_weight + tl.arange(0, BK), mask=m_head, other=0.0)
        size_new, size = load_size(p_new, o_new, m_token), load_size(p_tail, o_tail, m_token)
        b_bias = size_bias(size, b_weight)
        size = tl.where(merges, size, 0.0) + load_size(p_ring, o_leaving, m_token)
    # Threads read what others write: all reads come first.
    tl.debug_barrier()
    store_entry(
        p_pages, page_stride, p_table + o_head * num_columns, slot, b_key, b_bias, tail[1],
        closes, D, DV, PS, BD, BV,
    )  # fmt: skip
    tl.store(p_lengths + o_head, slot + 1, mask=closes)
    mean = (mean_key, mean_value, leaving[2], leaving[3], leaving[4], weight, leaving[6])
    store_token(p_tail, o_tail, m_token, mean, False)
    if HAS_RING:
        store_token(p_ring, o_leaving, m_token, new, True)
    if p_size_weight is not None:
        tl.store(p_tail[7] + o_head, size, mask=m_head)
        tl.store(p_open_bias + o_head, size_bias(size, b_weight), mask=m_head)
        if HAS_RING:
            tl.store(p_ring[7] + o_leaving[0], size_new, mask=m_head)


def fold(call: StepCall) -> Tensor | None:
    """`reference.fold` in one launch, but for `call.turn`: `decode` moves it on when all is read.

    Returns:
        `call.open_bias` after the fold, (B, K, 1) float32.

    The tail is not valid, so that the new token opens an entry (no ring, W = 0):

    >>> import torch
    >>> number, angle = torch.ones(1, 1, 1), torch.ones(1, 1, 2)
    >>> vector = torch.ones(1, 1, 1, 2)
    >>> new = Tokens(vector, 5 * vector, angle, angle, number, number, angle[0, :, :1] > 0)
    >>> tail = Tokens(vector, vector, angle, angle, number, number, angle[0, :, :1] < 0)
    >>> call = StepCall(
    ...     query=vector, new=new, ring=new.narrow(0, 0), turn=torch.tensor(0),
    ...     tail=tail.slice(0, 1), pages=torch.ones(1, 64), page_size=16,
    ...     table=torch.zeros(1, 1, 1, dtype=torch.int32),
    ...     lengths=torch.zeros(1, 1, dtype=torch.int64), scaling=1.0)
    >>> fold(call)
    >>> call.tail.value.flatten().tolist(), call.tail.valid.item()
    ([5.0, 5.0], True)
    """
    batch, kv_heads, width, dim = call.ring.key.shape
    value_dim, rotary_dim = call.ring.value.shape[3], call.ring.cos.shape[2]
    new = _contiguous(call.new)
    ring = call.ring if width else new
    weight, open_bias = call.size_weight, None
    if weight is not None:
        weight = weight.contiguous()
        open_bias = weight.new_empty(batch, kv_heads, 1, dtype=torch.float32)
    heads, widest = triton.next_power_of_2(kv_heads), max(padded(dim), padded(value_dim))
    fold_fwd_kernel[(batch,)](
        p_new=tuple(new.tensors()), new_angle_stride=batch_stride(new.cos),
        p_ring=tuple(ring.tensors()), ring_angle_stride=batch_stride(ring.cos),
        width=max(width, 1), p_turn=call.turn, p_tail=tuple(call.tail.tensors()),
        p_pages=call.pages, page_stride=call.pages.stride(0), p_table=call.table,
        num_columns=call.table.shape[2], p_lengths=call.lengths, p_factors=call.factors,
        p_size_weight=weight, p_open_bias=open_bias, HAS_RING=width > 0, K=kv_heads, D=dim,
        DV=value_dim, R=rotary_dim, PS=call.page_size, BK=heads, BD=padded(dim),
        BV=padded(value_dim), BR=padded(rotary_dim),
        num_warps=max(1, min(16, heads * widest // (32 * NUMBERS))),
    )  # fmt: skip
    return open_bias


def step(call: StepCall) -> Tensor:
    """Folds what leaves the ring, in place, then attends from the new token: three launches.

    Returns:
        (B, H, 1, Dv) in the dtype of the query, without gradient. `fold` has an example.
    """
    open_bias = fold(call)
    new, ring, tail = call.new, call.ring, call.tail
    return decode(
        Columns(
            query=call.query.contiguous(), pages=call.pages, page_size=call.page_size,
            table=call.table, lengths=call.lengths, open=(tail.key, tail.value, tail.valid),
            open_bias=open_bias, exact=(ring.key, ring.value, ring.valid), scaling=call.scaling,
            softcap=call.softcap,
            query_angles=(new.cos.contiguous(), new.sin.contiguous()),
            open_angles=(tail.cos, tail.sin), exact_angles=(ring.cos, ring.sin),
            factors=call.factors, turn=call.turn if ring.valid.shape[1] else None,
        )
    )  # fmt: skip


def _contiguous(tokens: Tokens) -> Tokens:
    return Tokens(*(tensor.contiguous() for tensor in tokens.tensors()))
