"""What the forward and the backward pass of Triton's training attention share: one tile of scores.

Legend: B batch, H query heads, K kv heads, G = H / K, T tokens, D key dim, V value dim. A tile is
ROWS queries x COLUMNS tokens. Prefixes in kernels: i_ index of a program, o_ offsets, m_ mask, p_
pointer, b_ block of numbers. Query i sees the exact keys (i-w, i] and the running entries j <= i-w,
w = delay; definition in `cachefold.attention.call`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cachefold.attention.call import HIDDEN, ParallelCall

HIDDEN_BIAS = tl.constexpr(HIDDEN)
LARGEST_DIM = 256
"""A wider head leaves no room for two tiles in the shared memory of any card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a kernel is cut up."""

    rows: int
    """Queries of a tile, at least 16: the least that tensor cores take."""
    columns: int
    """Tokens of a tile, at least 16."""
    warps: int = 4
    stages: int = 2
    """Tiles in flight: the next one loads while this one is multiplied."""


# Chosen without a GPU, by the compiler's own account for sm_80 and sm_90: the largest tiles that
# stay in the registers and in the 99 KiB of shared memory that one program gets on consumer cards
# (A100 and H100 give more). float32 is multiplied without tensor cores, which unrolls into far more
# registers.
FORWARD_BLOCKS = {
    # (padded dim, bytes per number)
    (64, 2): Blocks(rows=128, columns=64, warps=8),
    (128, 2): Blocks(rows=64, columns=64),
    (256, 2): Blocks(rows=64, columns=32, warps=8),
    (64, 4): Blocks(rows=64, columns=32, warps=8),
    (128, 4): Blocks(rows=16, columns=16),
    (256, 4): Blocks(rows=16, columns=16),
}
BACKWARD_BLOCKS = {
    (64, 2): Blocks(rows=64, columns=64, warps=8),
    (128, 2): Blocks(rows=32, columns=64, warps=8),
    (256, 2): Blocks(rows=32, columns=32, warps=8),
    (64, 4): Blocks(rows=32, columns=32, warps=8),
    (128, 4): Blocks(rows=16, columns=32),
    (256, 4): Blocks(rows=16, columns=16),
}


def padded(dim: int) -> int:
    """The power of two, at least 16, that a kernel rounds a head dim up to.

    >>> padded(8), padded(64), padded(80)
    (16, 64, 128)
    """
    return max(16, triton.next_power_of_2(dim))


def blocks_for(
    table: dict[tuple[int, int], Blocks], dim: int, value_dim: int, dtype: torch.dtype
) -> Blocks:
    """The row of a block table for heads of `dim` and `value_dim`.

    >>> blocks_for(FORWARD_BLOCKS, 64, 64, torch.bfloat16).rows
    128
    """
    return table[max(64, padded(dim), padded(value_dim)), dtype.itemsize]


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What `tl.dot` is given for tensors of `dtype`: the same.

    Triton's interpreter keeps bfloat16 as bits in integers and would multiply those; it gets
    float32.

    >>> dot_dtype(torch.float16)
    triton.language.float16
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[
        dtype
    ]


def supports(call: ParallelCall) -> tuple[bool, str]:
    """Whether the kernels can do a call, and if not, the reason.

    >>> one = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    >>> supports(ParallelCall(
    ...     query=one, exact_key=one, exact_value=one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0))
    (False, 'queries are torch.float64; the kernels take bfloat16, float16 and float32')
    """
    dtype, dim = call.query.dtype, max(call.query.shape[-1], call.exact_value.shape[-1])
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False, f"queries are {dtype}; the kernels take bfloat16, float16 and float32"
    if dim > LARGEST_DIM:
        return False, f"the head dim is {dim}; the kernels go up to {LARGEST_DIM}"
    return True, ""


@triton.jit
def load_rows(
    p_x: tl.tensor, o_row: tl.tensor, T: int, DIM: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows of a (T, DIM) matrix, [rows, BLOCK]; 0 where there is none."""
    o_dim = tl.arange(0, BLOCK)
    m_row = (o_row < T)[:, None] & (o_dim < DIM)[None, :]
    p_tile = p_x + o_row[:, None].to(tl.int64) * DIM + o_dim[None, :]
    return tl.load(p_tile, mask=m_row, other=0.0)


@triton.jit
def store_rows(
    p_x: tl.tensor, b_x: tl.tensor, o_row: tl.tensor, T: int, DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Writes [rows, BLOCK] to rows of a (T, DIM) matrix, in its dtype."""
    o_dim = tl.arange(0, BLOCK)
    m_row = (o_row < T)[:, None] & (o_dim < DIM)[None, :]
    p_tile = p_x + o_row[:, None].to(tl.int64) * DIM + o_dim[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_row)


@triton.jit
def dot(b_x: tl.tensor, b_y: tl.tensor, DOT: tl.constexpr) -> tl.tensor:
    """[M, N] x [N, O] -> [M, O] in float32. TF32 would cost float32 half its digits."""
    return tl.dot(b_x.to(DOT), b_y.to(DOT), input_precision="ieee")


@triton.jit
def capped_scores(
    b_left: tl.tensor, b_right: tl.tensor, scaling: float, CAP: tl.constexpr, DOT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[M, BLOCK_D] x [N, BLOCK_D] -> [M, N], queries times keys or the other way round."""
    b_scores = dot(b_left, tl.trans(b_right), DOT) * scaling
    if CAP is not None:
        # tanh, by what the interpreter has too.
        b_scores = CAP * (2.0 * tl.sigmoid(b_scores * (2.0 / CAP)) - 1.0)
    return b_scores


@triton.jit
def tile_bias(
    o_row: tl.tensor, o_column: tl.tensor, p_survival: tl.tensor, p_merged_bias: tl.tensor,
    p_valid: tl.tensor, T: int, delay: int, MERGED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Bias on the exact or the merged columns of a tile, in the shape the offsets broadcast to.

    A superseded entry carries log(1 - alpha of the next token), the one still open at i-w does not;
    both carry `p_merged_bias`, if there is one.
    """
    b_valid = tl.load(p_valid + o_column, mask=o_column < T, other=0)
    b_age = o_row - o_column
    m_seen = (o_row < T) & (b_valid != 0)
    if MERGED:
        b_survival = tl.load(p_survival + o_column, mask=o_column < T, other=0.0)
        b_bias = tl.where(b_age == delay, 0.0, b_survival)
        if p_merged_bias is not None:
            b_bias += tl.load(p_merged_bias + o_column, mask=o_column < T, other=0.0)
        return tl.where(m_seen & (b_age >= delay), b_bias, HIDDEN_BIAS)
    return tl.where(m_seen & (b_age >= 0) & (b_age < delay), 0.0, HIDDEN_BIAS)


@triton.jit
def exp_seen(b_exponent: tl.tensor, b_bias: tl.tensor) -> tl.tensor:
    """exp, but 0 in hidden columns: a row that sees nothing has no largest score."""
    return tl.where(b_bias > 0.5 * HIDDEN_BIAS, tl.exp(b_exponent), 0.0)
