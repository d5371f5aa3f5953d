"""Backward pass of `triton_train`: gradients of query, keys, values and the biases on entries.

With P the probabilities, O the output and dO its gradient: dV = P^T dO, dS = P (dO V^T - delta),
delta = rowsum(dO O); dS is the gradient of the bias, and behind the tanh cap that of the products
(Dao et al. 2022, Flash Attention, appendix B). P comes back tile by tile from the saved
log-sum-exp. A key's gradient sums over the queries of its group inside one program, so nothing is
added atomically and the result is the same every time. Legend as in `triton_train_tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachefold.attention.triton_train_tiles import (
    BACKWARD_BLOCKS,
    blocks_for,
    capped_scores,
    dot,
    dot_dtype,
    exp_seen,
    load_rows,
    padded,
    store_rows,
    tile_bias,
)


@triton.jit
def _score_gradient(
    b_scores: tl.tensor, b_dweights: tl.tensor, b_bias: tl.tensor, b_lse: tl.tensor,
    b_delta: tl.tensor, CAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """P, the gradient of the biased scores and that of the products, in the shape of the scores.

    `b_dweights` is dO V^T; the scores are capped, without the bias.
    """
    b_weights = exp_seen(b_scores + b_bias - b_lse, b_bias)
    b_biased = b_weights * (b_dweights - b_delta)
    b_product = b_biased
    if CAP is not None:
        b_share = b_scores / CAP
        b_product = b_biased * (1.0 - b_share * b_share)
    return b_weights, b_biased, b_product


@triton.jit
def _query_gradient(
    b_query: tl.tensor, p_key: tl.tensor, p_value: tl.tensor, b_grad: tl.tensor, b_bias: tl.tensor,
    b_lse: tl.tensor, b_delta: tl.tensor, o_column: tl.tensor, b_dquery: tl.tensor, T: int,
    scaling: float, CAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Takes one more tile into the gradient of the queries."""
    b_key = load_rows(p_key, o_column, T, DIM, BLOCK_D)
    b_value = load_rows(p_value, o_column, T, VALUE_DIM, BLOCK_V)
    b_scores = capped_scores(b_query, b_key, scaling, CAP, DOT)
    b_dweights = dot(b_grad, tl.trans(b_value), DOT)
    _, _, b_product = _score_gradient(
        b_scores, b_dweights, b_bias, b_lse[:, None], b_delta[:, None], CAP
    )
    return b_dquery + dot(b_product.to(b_key.dtype), b_key, DOT)


@triton.jit
def parallel_bwd_kernel_query(
    p_grad: tl.tensor, p_query: tl.tensor, p_exact_key: tl.tensor, p_exact_value: tl.tensor,
    p_merged_key: tl.tensor, p_merged_value: tl.tensor, p_survival: tl.tensor,
    p_merged_bias: tl.tensor, p_valid: tl.tensor, p_out: tl.tensor, p_lse: tl.tensor,
    p_delta: tl.tensor, p_dquery: tl.tensor, T: int, delay: int, scaling: float,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DOT: tl.constexpr,
) -> None:  # fmt: skip
    """One program per query head and ROWS queries; also writes delta for the other kernel."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_row = tl.num_programs(1) - 1 - tl.program_id(1)
    i_bk = i_bh // GROUP
    p_valid += i_bh // HEADS * T
    p_survival += i_bk * T
    if p_merged_bias is not None:
        p_merged_bias += i_bk * T
    first = i_row * ROWS
    stop = tl.minimum(first + ROWS, T)
    o_row = first + tl.arange(0, ROWS)
    b_query = load_rows(p_query + i_bh * T * DIM, o_row, T, DIM, BLOCK_D)
    b_grad = load_rows(p_grad + i_bh * T * VALUE_DIM, o_row, T, VALUE_DIM, BLOCK_V)
    b_out = load_rows(p_out + i_bh * T * VALUE_DIM, o_row, T, VALUE_DIM, BLOCK_V)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + i_bh * T + o_row, b_delta, mask=o_row < T)
    b_lse = tl.load(p_lse + i_bh * T + o_row, mask=o_row < T, other=0.0)
    b_dquery = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, stop - delay, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_bias = tile_bias(
            o_row[:, None], o_column[None, :], p_survival, p_merged_bias, p_valid, T, delay, True
        )
        b_dquery = _query_gradient(
            b_query, p_merged_key + i_bk * T * DIM, p_merged_value + i_bk * T * VALUE_DIM,
            b_grad, b_bias, b_lse, b_delta, o_column, b_dquery, T, scaling,
            CAP, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, DOT,
        )  # fmt: skip
    stop = tl.where(delay > 0, stop, 0)  # without a delay no key is seen exactly
    for start in range(tl.maximum(first - delay + 1, 0), stop, COLUMNS):
        o_column = start + tl.arange(0, COLUMNS)
        b_bias = tile_bias(
            o_row[:, None], o_column[None, :], p_survival, p_merged_bias, p_valid, T, delay, False
        )
        b_dquery = _query_gradient(
            b_query, p_exact_key + i_bk * T * DIM, p_exact_value + i_bk * T * VALUE_DIM,
            b_grad, b_bias, b_lse, b_delta, o_column, b_dquery, T, scaling,
            CAP, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, DOT,
        )  # fmt: skip
    store_rows(p_dquery + i_bh * T * DIM, b_dquery * scaling, o_row, T, DIM, BLOCK_D)


@triton.jit
def parallel_bwd_kernel_columns(
    p_grad: tl.tensor, p_query: tl.tensor, p_key: tl.tensor, p_value: tl.tensor,
    p_survival: tl.tensor, p_merged_bias: tl.tensor, p_valid: tl.tensor, p_lse: tl.tensor,
    p_delta: tl.tensor, p_dkey: tl.tensor, p_dvalue: tl.tensor, p_dsurvival: tl.tensor,
    p_dmerged_bias: tl.tensor, T: int, delay: int, scaling: float, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr, MERGED: tl.constexpr,
) -> None:  # fmt: skip
    """One program per kv head and COLUMNS tokens, merged or exact, over the rows that see them."""
    i_bk = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    p_valid += i_bk // KV_HEADS * T
    p_survival += i_bk * T
    if p_merged_bias is not None:
        p_merged_bias += i_bk * T
    o_column = first + tl.arange(0, COLUMNS)
    b_key = load_rows(p_key + i_bk * T * DIM, o_column, T, DIM, BLOCK_D)
    b_value = load_rows(p_value + i_bk * T * VALUE_DIM, o_column, T, VALUE_DIM, BLOCK_V)
    b_dkey = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    b_dvalue = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    b_dsurvival = tl.zeros([COLUMNS], tl.float32)
    b_dmerged_bias = tl.zeros([COLUMNS], tl.float32)
    row = first + delay if MERGED else first
    stop = T if MERGED else tl.minimum(first + COLUMNS - 1 + delay, T)
    for i_group in range(0, GROUP):
        i_bh = i_bk * GROUP + i_group
        for start in range(row, stop, ROWS):
            o_row = start + tl.arange(0, ROWS)
            b_query = load_rows(p_query + i_bh * T * DIM, o_row, T, DIM, BLOCK_D)
            b_grad = load_rows(p_grad + i_bh * T * VALUE_DIM, o_row, T, VALUE_DIM, BLOCK_V)
            b_lse = tl.load(p_lse + i_bh * T + o_row, mask=o_row < T, other=0.0)
            b_delta = tl.load(p_delta + i_bh * T + o_row, mask=o_row < T, other=0.0)
            # Transposed, [COLUMNS, ROWS]: that is how the products below take it.
            b_bias = tile_bias(
                o_row[None, :], o_column[:, None], p_survival, p_merged_bias, p_valid, T, delay,
                MERGED,
            )  # fmt: skip
            b_scores = capped_scores(b_key, b_query, scaling, CAP, DOT)
            b_dweights = dot(b_value, tl.trans(b_grad), DOT)
            b_weights, b_biased, b_product = _score_gradient(
                b_scores, b_dweights, b_bias, b_lse[None, :], b_delta[None, :], CAP
            )
            b_dvalue += dot(b_weights.to(b_grad.dtype), b_grad, DOT)
            b_dkey += dot(b_product.to(b_query.dtype), b_query, DOT)
            if MERGED:
                # The entry still open has nothing to survive.
                m_closed = o_row[None, :] - o_column[:, None] > delay
                b_dsurvival += tl.sum(tl.where(m_closed, b_biased, 0.0), 1)
                if p_merged_bias is not None:
                    b_dmerged_bias += tl.sum(b_biased, 1)
    store_rows(p_dkey + i_bk * T * DIM, b_dkey * scaling, o_column, T, DIM, BLOCK_D)
    store_rows(p_dvalue + i_bk * T * VALUE_DIM, b_dvalue, o_column, T, VALUE_DIM, BLOCK_V)
    if MERGED:
        tl.store(p_dsurvival + i_bk * T + o_column, b_dsurvival, mask=o_column < T)
        if p_merged_bias is not None:
            tl.store(p_dmerged_bias + i_bk * T + o_column, b_dmerged_bias, mask=o_column < T)


def backward(
    grad: Tensor,
    query: Tensor,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    survival: Tensor,
    merged_bias: Tensor | None,
    valid: Tensor,
    out: Tensor,
    lse: Tensor,
    delay: int,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    """Launches the backward kernels; every tensor contiguous.

    Args:
        grad: (B, H, T, V), gradient of the output.
        query: (B, H, T, D).
        columns: exact keys (B, K, T, D) and values (B, K, T, V), merged keys and values.
        survival: (B, K, T) float32, `call.log_survival`.
        merged_bias: (B, K, T) float32, `ParallelCall.merged_bias`; None = 0.
        valid: (B, T) int8.
        out: (B, H, T, V), of the forward pass.
        lse: (B, H, T) float32, of the forward pass.
        delay: w, tokens that stay exact.
        scaling: factor on the scores.
        softcap: tanh cap on the scores.

    Returns:
        Gradients of the query, the four tensors of `columns`, `survival` and `merged_bias`.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> valid = torch.ones(1, 1, dtype=torch.int8)
    >>> gradients = backward(
    ...     3 * one, one, (one, one, one, one), 0 * one[0], None, valid, one, one[0], 1, 1.0, None)
    >>> [gradient.item() for gradient in gradients[:-1]]  # a lone token: its value takes it all
    [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = columns[1].shape[1], columns[1].shape[3]
    blocks = blocks_for(BACKWARD_BLOCKS, dim, value_dim, query.dtype)
    dquery, delta, dsurvival = (torch.empty_like(x) for x in (query, lse, survival))
    dmerged_bias = None if merged_bias is None else torch.empty_like(merged_bias)
    gradients = [torch.empty_like(x) for x in columns]
    options = dict(
        GROUP=heads // kv_heads, CAP=softcap, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_D=padded(dim), BLOCK_V=padded(value_dim), ROWS=blocks.rows,
        COLUMNS=blocks.columns, DOT=dot_dtype(query.dtype), num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    with torch.cuda.device_of(query):
        parallel_bwd_kernel_query[batch * heads, triton.cdiv(tokens, blocks.rows)](
            grad, query, *columns, survival, merged_bias, valid, out, lse, delta, dquery, tokens,
            delay, scaling, HEADS=heads, **options,
        )  # fmt: skip
        for merged in (False, True):
            pair = slice(2, 4) if merged else slice(0, 2)
            parallel_bwd_kernel_columns[batch * kv_heads, triton.cdiv(tokens, blocks.columns)](
                grad, query, *columns[pair], survival, merged_bias, valid, lse, delta,
                *gradients[pair], dsurvival, dmerged_bias, tokens, delay, scaling,
                KV_HEADS=kv_heads, MERGED=merged, **options,
            )  # fmt: skip
    return dquery, *gradients, dsurvival, dmerged_bias
