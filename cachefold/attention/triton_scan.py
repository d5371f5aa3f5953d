"""`core.merging.running_means` as Triton kernels: the pooling scan and its reverse.

S_t = alpha_t S_{t-1} + omega_t x_t, z_t likewise without x; the running entry is S_t / z_t. Inside
a block of BT tokens the recurrence is a product with the matrix of decays, as in `core.merging`.
Without a window a program walks the blocks and carries S; with one it looks back as many blocks as
the window reaches, so every block is a program. Legend: B batch, K kv heads, T tokens, D channels
of x, W window. Prefixes: i_ index of a program, o_ offsets, m_ mask, p_ pointer, b_ block of
numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Chosen without a GPU, by the compiler's own account for sm_80 and sm_90: the largest blocks of
# tokens whose BT x BT decays stay in the registers, in the backward pass too.
WALK_TOKENS = 32
"""BT of a program that walks the text: T / BT steps, one after the other."""
WINDOW_TOKENS = 16
"""BT of a program that looks back: the window of the paper, 12 tokens, reaches one block back."""
BLOCK_CHANNELS = 64
"""Channels per program; a wider head is more programs, which few heads leave room for."""
WARPS = 4


@triton.jit
def load_tokens(p_x: tl.tensor, o_token: tl.tensor, T: int, fill: float) -> tl.tensor:
    """One number per token in float32, `fill` outside the text."""
    m_token = (o_token >= 0) & (o_token < T)
    return tl.load(p_x + o_token, mask=m_token, other=fill).to(tl.float32)


@triton.jit
def load_channels(
    p_x: tl.tensor, o_token: tl.tensor, o_channel: tl.tensor, T: int, DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[tokens, channels] in float32, 0 outside the text."""
    m_token = ((o_token >= 0) & (o_token < T))[:, None] & (o_channel < DIM)[None, :]
    p_tile = p_x + o_token[:, None].to(tl.int64) * DIM + o_channel[None, :]
    return tl.load(p_tile, mask=m_token, other=0.0).to(tl.float32)


@triton.jit
def store_channels(
    p_x: tl.tensor, b_x: tl.tensor, o_token: tl.tensor, o_channel: tl.tensor, T: int,
    DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Writes [tokens, channels] in the dtype of the tensor."""
    m_token = (o_token < T)[:, None] & (o_channel < DIM)[None, :]
    p_tile = p_x + o_token[:, None].to(tl.int64) * DIM + o_channel[None, :]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=m_token)


@triton.jit
def product(b_x: tl.tensor, b_y: tl.tensor) -> tl.tensor:
    """[M, N] x [N, O] in float32. TF32 would cost half the digits."""
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def decays(b_alpha: tl.tensor, BT: tl.constexpr) -> tl.tensor:
    """[t, j]: product of alpha over (j, t] inside a block; 0 above the diagonal."""
    o_t = tl.arange(0, BT)
    b_factor = tl.where(o_t[:, None] > o_t[None, :], b_alpha[:, None], 1.0)
    return tl.where(o_t[:, None] >= o_t[None, :], tl.cumprod(b_factor, 0), 0.0)


@triton.jit
def decays_before(b_before: tl.tensor, BT: tl.constexpr) -> tl.tensor:
    """[t, j]: product of alpha over (j, t) inside a block, t > j; 0 elsewhere.

    `b_before` is the alpha of the token before t.
    """
    o_t = tl.arange(0, BT)
    b_factor = tl.where(o_t[:, None] > o_t[None, :] + 1, b_before[:, None], 1.0)
    return tl.where(o_t[:, None] > o_t[None, :], tl.cumprod(b_factor, 0), 0.0)


@triton.jit
def decays_to_end(p_alpha: tl.tensor, o_token: tl.tensor, T: int, BT: tl.constexpr) -> tl.tensor:
    """[j]: product of alpha over (j, end of the block]."""
    b_next = load_tokens(p_alpha, o_token + 1, T, 0.0)
    b_next = tl.where(tl.arange(0, BT) == BT - 1, 1.0, b_next)
    return tl.cumprod(b_next, 0, reverse=True)


@triton.jit
def row_of(b_x: tl.tensor, row: int, BT: tl.constexpr) -> tl.tensor:
    """Row `row` of [BT, channels]."""
    return tl.sum(tl.where((tl.arange(0, BT) == row)[:, None], b_x, 0.0), 0)


@triton.jit
def number_of(b_x: tl.tensor, row: int, BT: tl.constexpr) -> tl.tensor:
    """Number `row` of [BT]."""
    return tl.sum(tl.where(tl.arange(0, BT) == row, b_x, 0.0), 0)


@triton.jit
def store_means(
    p_mean: tl.tensor, p_weight: tl.tensor, b_sums: tl.tensor, b_weights: tl.tensor,
    o_token: tl.tensor, o_channel: tl.tensor, T: int, i_channel: int, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Writes S / z and z of a block of tokens."""
    m_token = o_token < T
    b_mean = b_sums / tl.where(m_token, b_weights, 1.0)[:, None]
    store_channels(p_mean, b_mean, o_token, o_channel, T, DIM)
    if i_channel == 0:  # every channel block has the same weights
        tl.store(p_weight + o_token, b_weights, mask=m_token)


@triton.jit
def sum_gradients(
    p_dmean: tl.tensor, p_dweight: tl.tensor, p_mean: tl.tensor, p_weight: tl.tensor,
    o_token: tl.tensor, o_channel: tl.tensor, T: int, i_channel: int, DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Gradients of S and z of single tokens, [tokens, channels] and [tokens].

    That of z is the part of these channels; parts add up.
    """
    b_weight = load_tokens(p_weight, o_token, T, 1.0)
    b_dsum = load_channels(p_dmean, o_token, o_channel, T, DIM) / b_weight[:, None]
    b_part = tl.sum(b_dsum * load_channels(p_mean, o_token, o_channel, T, DIM), 1)
    b_dweight = load_tokens(p_dweight, o_token, T, 0.0)
    return b_dsum, tl.where(i_channel == 0, b_dweight, 0.0) - b_part


@triton.jit
def store_gradients(
    p_dx: tl.tensor, p_dalpha: tl.tensor, p_domega: tl.tensor, p_x: tl.tensor, p_omega: tl.tensor,
    b_dsum: tl.tensor, b_dweight: tl.tensor, b_dalpha: tl.tensor, o_token: tl.tensor,
    o_channel: tl.tensor, T: int, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the gradients of a block of tokens, given those of its terms omega x and omega."""
    b_omega = load_tokens(p_omega, o_token, T, 0.0)
    b_x = load_channels(p_x, o_token, o_channel, T, DIM)
    store_channels(p_dx, b_dsum * b_omega[:, None], o_token, o_channel, T, DIM)
    b_domega = tl.sum(b_dsum * b_x, 1) + b_dweight
    tl.store(p_domega + o_token, b_domega, mask=o_token < T)
    tl.store(p_dalpha + o_token, b_dalpha, mask=o_token < T)


@triton.jit
def means_fwd_kernel(
    p_x: tl.tensor, p_alpha: tl.tensor, p_omega: tl.tensor, p_mean: tl.tensor, p_weight: tl.tensor,
    T: int, DIM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """One program per kv head and channel block walks the blocks of tokens with S and z."""
    i_bk, i_channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_channel = i_channel * BC + tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float32)
    b_weight = tl.sum(tl.zeros([BT], tl.float32), 0)
    for start in range(0, T, BT):
        o_token = start + tl.arange(0, BT)
        b_alpha = load_tokens(p_alpha + i_bk * T, o_token, T, 0.0)
        b_omega = load_tokens(p_omega + i_bk * T, o_token, T, 0.0)
        b_x = load_channels(p_x + i_bk * T * DIM, o_token, o_channel, T, DIM)
        b_decays, b_reach = decays(b_alpha, BT), tl.cumprod(b_alpha, 0)
        b_sums = product(b_decays, b_x * b_omega[:, None]) + b_reach[:, None] * b_sum[None, :]
        b_weights = tl.sum(b_decays * b_omega[None, :], 1) + b_reach * b_weight
        store_means(
            p_mean + i_bk * T * DIM, p_weight + i_bk * T, b_sums, b_weights, o_token, o_channel,
            T, i_channel, DIM,
        )  # fmt: skip
        b_sum = row_of(b_sums, BT - 1, BT)
        b_weight = number_of(b_weights, BT - 1, BT)


@triton.jit
def means_bwd_kernel(
    p_dmean: tl.tensor, p_dweight: tl.tensor, p_x: tl.tensor, p_alpha: tl.tensor,
    p_omega: tl.tensor, p_mean: tl.tensor, p_weight: tl.tensor, p_dx: tl.tensor,
    p_dalpha: tl.tensor, p_domega: tl.tensor, T: int, DIM: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr,
) -> None:  # fmt: skip
    """The reverse scan, from the last block of tokens to the first.

    A gradient of S flows back as G_t = dS_t + alpha_{t+1} G_{t+1}; that of alpha is G_t S_{t-1}.
    """
    i_bk, i_channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # Gradients of alpha and omega come in parts, one per channel block.
    i_part = i_channel * tl.num_programs(0) + i_bk
    o_channel = i_channel * BC + tl.arange(0, BC)
    b_later = tl.zeros([BC], tl.float32)
    b_later_weight = tl.sum(tl.zeros([BT], tl.float32), 0)
    for back in range(0, T, BT):
        o_token = (T - 1) // BT * BT - back + tl.arange(0, BT)
        b_dsum, b_dweight = sum_gradients(
            p_dmean + i_bk * T * DIM, p_dweight + i_bk * T, p_mean + i_bk * T * DIM,
            p_weight + i_bk * T, o_token, o_channel, T, i_channel, DIM,
        )  # fmt: skip
        b_alpha = load_tokens(p_alpha + i_bk * T, o_token, T, 0.0)
        b_decays = decays(b_alpha, BT)
        b_to_end = decays_to_end(p_alpha + i_bk * T, o_token, T, BT)
        b_total = tl.sum(b_decays * b_dweight[:, None], 0) + b_to_end * b_later_weight
        b_totals = product(tl.trans(b_decays), b_dsum) + b_to_end[:, None] * b_later[None, :]
        b_before = load_channels(p_mean + i_bk * T * DIM, o_token - 1, o_channel, T, DIM)
        b_dalpha = tl.sum(b_totals * b_before, 1) + b_total
        b_dalpha *= load_tokens(p_weight + i_bk * T, o_token - 1, T, 0.0)
        store_gradients(
            p_dx + i_bk * T * DIM, p_dalpha + i_part * T, p_domega + i_part * T,
            p_x + i_bk * T * DIM, p_omega + i_bk * T, b_totals, b_total, b_dalpha, o_token,
            o_channel, T, DIM,
        )  # fmt: skip
        b_first = number_of(b_alpha, 0, BT)
        b_later = row_of(b_totals, 0, BT) * b_first
        b_later_weight = number_of(b_total, 0, BT) * b_first


@triton.jit
def windowed_fwd_kernel(
    p_x: tl.tensor, p_alpha: tl.tensor, p_omega: tl.tensor, p_mean: tl.tensor, p_weight: tl.tensor,
    T: int, window: int, DIM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """One program per kv head, block of tokens and channel block looks back over the window."""
    i_bk, i_channel = tl.program_id(0).to(tl.int64), tl.program_id(2)
    start = tl.program_id(1) * BT
    p_x += i_bk * T * DIM
    p_alpha += i_bk * T
    p_omega += i_bk * T
    o_t = start + tl.arange(0, BT)
    o_channel = i_channel * BC + tl.arange(0, BC)
    b_alpha = load_tokens(p_alpha, o_t, T, 0.0)
    b_own = decays(b_alpha, BT)
    b_between = tl.cumprod(b_alpha, 0)
    b_sums = tl.zeros([BT, BC], tl.float32)
    b_weights = tl.zeros([BT], tl.float32)
    for back in range(0, tl.minimum(start + 1, window + BT - 1), BT):
        o_j = o_t - back
        b_outer = b_between[:, None] * decays_to_end(p_alpha, o_j, T, BT)[None, :]
        b_decays = tl.where(back == 0, b_own, b_outer)
        b_decays = tl.where(o_t[:, None] - o_j[None, :] < window, b_decays, 0.0)
        b_omega = load_tokens(p_omega, o_j, T, 0.0)
        b_x = load_channels(p_x, o_j, o_channel, T, DIM)
        b_sums += product(b_decays, b_x * b_omega[:, None])
        b_weights += tl.sum(b_decays * b_omega[None, :], 1)
        b_all = number_of(tl.cumprod(load_tokens(p_alpha, o_j, T, 0.0), 0), BT - 1, BT)
        b_between *= tl.where(back == 0, 1.0, b_all)
    store_means(
        p_mean + i_bk * T * DIM, p_weight + i_bk * T, b_sums, b_weights, o_t, o_channel, T,
        i_channel, DIM,
    )  # fmt: skip


@triton.jit
def _windowed_alpha(
    p_x: tl.tensor, p_alpha: tl.tensor, p_omega: tl.tensor, b_left: tl.tensor, b_dsum: tl.tensor,
    b_dweight: tl.tensor, b_own: tl.tensor, b_reach: tl.tensor, o_s: tl.tensor, ahead: int,
    start: int, window: int, o_channel: tl.tensor, T: int, DIM: tl.constexpr, BT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Gradient of alpha_s from the sums of one block of tokens t >= s, [BT].

    alpha_s is a factor of what token j < s adds to the sum at t: (decay from s to t) * alpha_s *
    (decay from j to s - 1), times the gradient of that sum on the term of j.
    """
    b_dalpha = tl.zeros([BT], tl.float32)
    b_between = b_reach
    for back in range(0, tl.minimum(start + 1, window + BT - 1 - ahead), BT):
        o_j = o_s - back
        b_omega = load_tokens(p_omega, o_j, T, 0.0)
        b_term = load_channels(p_x, o_j, o_channel, T, DIM) * b_omega[:, None]
        b_pair = product(b_dsum, tl.trans(b_term)) + b_dweight[:, None] * b_omega[None, :]
        b_pair = tl.where(o_s[:, None] + ahead - o_j[None, :] < window, b_pair, 0.0)
        b_outer = b_between[:, None] * decays_to_end(p_alpha, o_j, T, BT)[None, :]
        b_right = tl.where(back == 0, b_own, b_outer)
        b_dalpha += tl.sum(product(tl.trans(b_left), b_pair) * b_right, 1)
        b_all = number_of(tl.cumprod(load_tokens(p_alpha, o_j, T, 0.0), 0), BT - 1, BT)
        b_between *= tl.where(back == 0, 1.0, b_all)
    return b_dalpha


@triton.jit
def windowed_bwd_kernel(
    p_dmean: tl.tensor, p_dweight: tl.tensor, p_x: tl.tensor, p_alpha: tl.tensor,
    p_omega: tl.tensor, p_mean: tl.tensor, p_weight: tl.tensor, p_dx: tl.tensor,
    p_dalpha: tl.tensor, p_domega: tl.tensor, T: int, window: int, DIM: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the tokens s of one block, from the sums at t in [s, s + window)."""
    i_bk, i_channel = tl.program_id(0).to(tl.int64), tl.program_id(2)
    start = tl.program_id(1) * BT
    i_part = i_channel * tl.num_programs(0) + i_bk
    p_x += i_bk * T * DIM
    p_alpha += i_bk * T
    p_omega += i_bk * T
    o_s = start + tl.arange(0, BT)
    o_channel = i_channel * BC + tl.arange(0, BC)
    b_own = decays(load_tokens(p_alpha, o_s, T, 0.0), BT)
    b_before = tl.where(o_s == start, 1.0, load_tokens(p_alpha, o_s - 1, T, 1.0))
    b_own_before, b_reach_before = decays_before(b_before, BT), tl.cumprod(b_before, 0)
    b_between = decays_to_end(p_alpha, o_s, T, BT)
    b_totals = tl.zeros([BT, BC], tl.float32)
    b_total = tl.zeros([BT], tl.float32)
    b_dalpha = tl.zeros([BT], tl.float32)
    for ahead in range(0, tl.minimum(T - start, window + BT - 1), BT):
        o_t = o_s + ahead
        b_dsum, b_dweight = sum_gradients(
            p_dmean + i_bk * T * DIM, p_dweight + i_bk * T, p_mean + i_bk * T * DIM,
            p_weight + i_bk * T, o_t, o_channel, T, i_channel, DIM,
        )  # fmt: skip
        b_reach = tl.cumprod(load_tokens(p_alpha, o_t, T, 0.0), 0)
        b_left = tl.where(ahead == 0, b_own, b_reach[:, None] * b_between[None, :])
        b_near = tl.where(o_t[:, None] - o_s[None, :] < window, b_left, 0.0)
        b_totals += product(tl.trans(b_near), b_dsum)
        b_total += tl.sum(b_near * b_dweight[:, None], 0)
        b_dalpha += _windowed_alpha(
            p_x, p_alpha, p_omega, b_left, b_dsum, b_dweight, b_own_before, b_reach_before, o_s,
            ahead, start, window, o_channel, T, DIM, BT,
        )  # fmt: skip
        b_between *= tl.where(ahead == 0, 1.0, number_of(b_reach, BT - 1, BT))
    store_gradients(
        p_dx + i_bk * T * DIM, p_dalpha + i_part * T, p_domega + i_part * T, p_x, p_omega,
        b_totals, b_total, b_dalpha, o_s, o_channel, T, DIM,
    )  # fmt: skip


def _channels(dim: int) -> int:
    """Channels per program."""
    return min(BLOCK_CHANNELS, max(16, triton.next_power_of_2(dim)))


def _launch(walk: Any, windowed: Any, window: int | None, tensors: list[Tensor]) -> None:
    """Runs one of two kernels on tensors in the shape of x, (B, K, T, D), at the first place."""
    batch, kv_heads, tokens, dim = tensors[0].shape
    heads, channels = batch * kv_heads, _channels(dim)
    options = dict(DIM=dim, BC=channels, num_warps=WARPS)
    with torch.cuda.device_of(tensors[0]):
        if window is None:
            walk[heads, triton.cdiv(dim, channels)](*tensors, tokens, BT=WALK_TOKENS, **options)
        else:
            grid = heads, triton.cdiv(tokens, WINDOW_TOKENS), triton.cdiv(dim, channels)
            windowed[grid](*tensors, tokens, window, BT=WINDOW_TOKENS, **options)


class _Means(torch.autograd.Function):
    """Running means of one tensor, and the weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, omega: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        x, alpha, omega = x.contiguous(), alpha.contiguous(), omega.contiguous()
        mean = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        weight = torch.empty(alpha.shape, dtype=torch.float32, device=x.device)
        _launch(means_fwd_kernel, windowed_fwd_kernel, window, [x, alpha, omega, mean, weight])
        ctx.save_for_backward(x, alpha, omega, mean, weight)
        ctx.window = window
        return mean, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor, dweight: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, omega, mean, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        parts = triton.cdiv(x.shape[-1], _channels(x.shape[-1]))
        dalpha, domega = torch.empty(2, parts, *alpha.shape, dtype=torch.float32, device=x.device)
        saved = [x, alpha, omega, mean, weight]
        tensors = [dmean.contiguous(), dweight.contiguous(), *saved, dx, dalpha, domega]
        _launch(means_bwd_kernel, windowed_bwd_kernel, ctx.window, tensors)
        return dx, dalpha.sum(0).to(alpha.dtype), domega.sum(0).to(omega.dtype), None


def running_means(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Running entry after every token; `core.merging.running_means` on a GPU.

    Args:
        key: (B, K, T, D), before rotary embedding.
        value: (B, K, T, Dv).
        alpha: (B, K, T) in [0, 1]; that of the first token has no effect.
        omega: (B, K, T) > 0.
        window: most tokens an entry averages; None = no bound.

    Returns:
        Mean keys (B, K, T, D), mean values (B, K, T, Dv) and weights z (B, K, T), in float32;
        differentiable in all inputs.

    Raises:
        ValueError: float64, which the kernels do not have.

    >>> key = torch.tensor([[[[1.0], [3.0]]]])
    >>> running_means(key, key, torch.ones(1, 1, 2), torch.ones(1, 1, 2))[0].flatten().tolist()
    [1.0, 2.0]
    """
    if torch.float64 in (key.dtype, value.dtype, alpha.dtype, omega.dtype):
        raise ValueError(
            "the Triton scan computes in float32; for float64 use core.merging.running_means"
        )
    if window is not None and window >= key.shape[2]:
        window = None
    mean_key, weight = _Means.apply(key, alpha, omega, window)
    return mean_key, _Means.apply(value, alpha, omega, window)[0], weight
