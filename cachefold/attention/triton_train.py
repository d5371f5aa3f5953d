"""`reference.parallel` as Triton kernels: for training and scoring on a GPU, differentiable.

Flash attention over two sets of columns, first the running entries a query can reach, then the
band of exact keys behind it; scores exist one tile at a time, never T x T. Accumulates in float32.
Legend and prefixes as in `triton_train_tiles`; the backward pass is `triton_train_bwd`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cachefold.attention.call import ParallelCall, log_survival
from cachefold.attention.triton_train_bwd import backward
from cachefold.attention.triton_train_tiles import (
    FORWARD_BLOCKS,
    HIDDEN_BIAS,
    blocks_for,
    capped_scores,
    dot,
    dot_dtype,
    exp_seen,
    load_rows,
    padded,
    store_rows,
    supports,
    tile_bias,
)


@triton.jit
def _accumulate(
    b_query: tl.tensor, p_key: tl.tensor, p_value: tl.tensor, b_bias: tl.tensor,
    o_column: tl.tensor, b_max: tl.tensor, b_sum: tl.tensor, b_out: tl.tensor, T: int,
    scaling: float, CAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes one more tile into the softmax: largest score, sum and output so far."""
    b_key = load_rows(p_key, o_column, T, DIM, BLOCK_D)
    b_value = load_rows(p_value, o_column, T, VALUE_DIM, BLOCK_V)
    b_scores = capped_scores(b_query, b_key, scaling, CAP, DOT) + b_bias
    b_top = tl.maximum(b_max, tl.max(b_scores, 1))
    b_decay = tl.exp(b_max - b_top)
    b_weights = exp_seen(b_scores - b_top[:, None], b_bias)
    b_part = dot(b_weights.to(b_value.dtype), b_value, DOT)
    return b_top, b_sum * b_decay + tl.sum(b_weights, 1), b_out * b_decay[:, None] + b_part


@triton.jit
def parallel_fwd_kernel(
    p_query: tl.tensor, p_exact_key: tl.tensor, p_exact_value: tl.tensor, p_merged_key: tl.tensor,
    p_merged_value: tl.tensor, p_survival: tl.tensor, p_merged_bias: tl.tensor, p_valid: tl.tensor,
    p_out: tl.tensor, p_lse: tl.tensor, T: int, delay: int, scaling: float, HEADS: tl.constexpr,
    GROUP: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:  # fmt: skip
    """One program per query head and ROWS queries, the longest rows first."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_row = tl.num_programs(1) - 1 - tl.program_id(1)
    i_bk = i_bh // GROUP
    p_valid += i_bh // HEADS * T
    p_survival += i_bk * T
    if p_merged_bias is not None:
        p_merged_bias += i_bk * T
    o_row = i_row * ROWS + tl.arange(0, ROWS)
    b_query = load_rows(p_query + i_bh * T * DIM, o_row, T, DIM, BLOCK_D)
    b_max = tl.full([ROWS], HIDDEN_BIAS, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_V], tl.float32)
    first = i_row * ROWS
    stop = tl.minimum(first + ROWS, T)
    for start in range(0, stop - delay, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_bias = tile_bias(
            o_row[:, None], o_column[None, :], p_survival, p_merged_bias, p_valid, T, delay, True
        )
        b_max, b_sum, b_out = _accumulate(
            b_query, p_merged_key + i_bk * T * DIM, p_merged_value + i_bk * T * VALUE_DIM,
            b_bias, o_column, b_max, b_sum, b_out, T, scaling,
            CAP, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, DOT,
        )  # fmt: skip
    stop = tl.where(delay > 0, stop, 0)  # without a delay no key is seen exactly
    for start in range(tl.maximum(first - delay + 1, 0), stop, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_bias = tile_bias(
            o_row[:, None], o_column[None, :], p_survival, p_merged_bias, p_valid, T, delay, False
        )
        b_max, b_sum, b_out = _accumulate(
            b_query, p_exact_key + i_bk * T * DIM, p_exact_value + i_bk * T * VALUE_DIM,
            b_bias, o_column, b_max, b_sum, b_out, T, scaling,
            CAP, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, DOT,
        )  # fmt: skip
    # A padding row may see nothing: its output is 0, not 0 / 0.
    b_sum = tl.where(b_sum > 0, b_sum, 1.0)
    p_out += i_bh * T * VALUE_DIM
    store_rows(p_out, b_out / b_sum[:, None], o_row, T, VALUE_DIM, BLOCK_V)
    tl.store(p_lse + i_bh * T + o_row, b_max + tl.log(b_sum), mask=o_row < T)


def forward(
    query: Tensor,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    survival: Tensor,
    merged_bias: Tensor | None,
    valid: Tensor,
    delay: int,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; every tensor contiguous.

    Args:
        query: (B, H, T, D).
        columns: exact keys (B, K, T, D) and values (B, K, T, V), merged keys and values, all in
            the dtype of the query.
        survival: (B, K, T) float32, `call.log_survival`.
        merged_bias: (B, K, T) float32, `ParallelCall.merged_bias`; None = 0.
        valid: (B, T) int8.
        delay: w, tokens that stay exact.
        scaling: factor on the scores.
        softcap: tanh cap on the scores.

    Returns:
        Output (B, H, T, V) in the dtype of the query, and log-sum-exp of the scores (B, H, T) in
        float32.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> valid = torch.ones(1, 1, dtype=torch.int8)
    >>> out, lse = forward(one, (one, one, one, one), one[0], None, valid, 1, 2.0, None)
    >>> out.item(), lse.item()
    (1.0, 2.0)
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = columns[1].shape[1], columns[1].shape[3]
    blocks = blocks_for(FORWARD_BLOCKS, dim, value_dim, query.dtype)
    out = torch.empty(batch, heads, tokens, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        parallel_fwd_kernel[batch * heads, triton.cdiv(tokens, blocks.rows)](
            query, *columns, survival, merged_bias, valid, out, lse, tokens, delay, scaling,
            HEADS=heads, GROUP=heads // kv_heads, CAP=softcap, DIM=dim, VALUE_DIM=value_dim,
            BLOCK_D=padded(dim), BLOCK_V=padded(value_dim), ROWS=blocks.rows,
            COLUMNS=blocks.columns, DOT=dot_dtype(query.dtype), num_warps=blocks.warps,
            num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse


class _Parallel(torch.autograd.Function):
    """Gradients for the query, the four column tensors and the biases of the entries."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, bias, valid, delay, scaling, softcap = args
        query, *columns, survival = (tensor.contiguous() for tensor in tensors)
        bias = None if bias is None else bias.contiguous()
        valid = valid.to(torch.int8).contiguous()
        out, lse = forward(query, tuple(columns), survival, bias, valid, delay, scaling, softcap)
        ctx.save_for_backward(query, *columns, survival, bias, valid, out, lse)
        ctx.options = delay, scaling, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, *columns, survival, bias, valid, out, lse = ctx.saved_tensors
        gradients = backward(
            grad.contiguous(), query, tuple(columns), survival, bias, valid, out, lse, *ctx.options
        )
        return *gradients, None, None, None, None


def parallel(call: ParallelCall) -> Tensor:
    """Attends from every token of a text to its folded past.

    Returns:
        (B, H, T, V) in the dtype of the query; 0 in padding rows, which see nothing.

    Raises:
        ValueError: a dtype or a head dim that the kernels do not have.

    A lone token sees only itself:

    >>> one = torch.ones(1, 1, 1, 2)
    >>> call = ParallelCall(
    ...     query=one, exact_key=one, exact_value=3 * one, merged_key=one, merged_value=one,
    ...     alpha=torch.zeros(1, 1, 1), valid=torch.ones(1, 1, dtype=torch.bool), delay=1,
    ...     scaling=1.0)
    >>> parallel(call).flatten().tolist()
    [3.0, 3.0]
    """
    possible, reason = supports(call)
    if not possible:
        raise ValueError(
            f"no Triton kernel for this call: {reason}. Use attention.blocked.parallel"
        )
    columns = (call.exact_key, call.exact_value, call.merged_key, call.merged_value)
    bias = None if call.merged_bias is None else call.merged_bias.float()
    return _Parallel.apply(
        call.query, *(tensor.to(call.query.dtype) for tensor in columns),
        log_survival(call.alpha.float()), bias, call.valid, call.delay, call.scaling, call.softcap,
    )  # fmt: skip
