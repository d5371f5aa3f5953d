"""What LLVM code is written by hand, each against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")
from numba import njit  # noqa: E402

from cachefold.attention import vectors  # noqa: E402

RNG = np.random.default_rng(0)
HALF = pytest.mark.parametrize("half", [False, True])


def numbers(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape)).float()


def stored(tensor: torch.Tensor, half: bool) -> torch.Tensor:
    return tensor.bfloat16() if half else tensor


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def run(function, *arguments) -> None:
    """Calls an intrinsic, which only compiled code can, with the addresses of tensors."""
    names = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope = {"function": function}
    exec(f"def call({names}):\n    function({names})", scope)
    addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    njit(scope["call"])(*addresses)


@HALF
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "stride"), [(1, 16), (3, 32), (12, 16)])
def test_score(rows, stride, biased, half):
    query, keys, out = numbers(rows, 8), stored(numbers(8, stride), half), nan(rows, 20)
    run(vectors.make_score(rows, 8, stride, half, biased), query, keys, out, 80, keys)
    torch.testing.assert_close(out[:, :16], query @ keys.float()[:, :16], rtol=0, atol=1e-5)
    assert out[:, 16:].isnan().all()


@HALF
def test_bias_adds_to_16_columns_of_every_row(half):
    source, scores = stored(numbers(16), half), numbers(3, 20)
    expected = scores.clone()
    expected[:, :16] += 2.0 * source.float()
    run(vectors.make_bias(3, half, 2.0), source, scores, 80)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@HALF
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (3, 64), (12, 80)])
@pytest.mark.parametrize("count", [0, 1, 16])
def test_weigh_reads_no_more_than_count(count, rows, dim, half):
    weights, values, sums = numbers(rows, 20), numbers(16, dim), numbers(rows, dim)
    values[count:] = torch.nan
    values = stored(values, half)
    expected = sums + weights[:, :count] @ values.float()[:count]
    run(vectors.make_weigh(rows, dim, half), weights, 80, values, count, sums, values)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top", [vectors.HIDDEN, -3.0, 40.0])
def test_soften_goes_on_with_a_softmax(top):
    scores = 5 * numbers(2, 32)
    scores[0, 3:20] = vectors.HIDDEN
    scores[1] = vectors.HIDDEN
    seen = torch.where(scores > vectors.HIDDEN / 2, scores.exp2(), 0.0)
    totals, sums, tops = numbers(2, 16).abs(), numbers(2, 16), torch.full((2,), top)
    if top == vectors.HIDDEN:
        totals, sums = torch.zeros(2, 16), torch.zeros(2, 16)
    before = 0.0 if top == vectors.HIDDEN else 2.0**top
    expected_total, expected_sums = totals.sum(1) * before + seen.sum(1), sums * before
    run(vectors.make_soften(2, 16), scores, 128, 2, tops, totals, sums)
    factor = tops.double().exp2()
    torch.testing.assert_close(totals.sum(1) * factor, expected_total.double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(
        sums * factor[:, None], expected_sums.double(), rtol=2e-6, atol=1e-30
    )
    torch.testing.assert_close(scores * factor[:, None], seen.double(), rtol=2e-6, atol=1e-30)


def test_dots():
    query, key, out = numbers(3, 48), numbers(48), nan(3, 2)
    run(vectors.make_dots(3, 48), query, key, out, 8)
    torch.testing.assert_close(out[:, 0], query @ key, rtol=0, atol=1e-5)
    assert out[:, 1].isnan().all()


@HALF
def test_copies_round_to_nearest_even(half):
    copies = vectors.make_copies(half)
    wide = torch.cat([numbers(30) * 1e3, torch.tensor([1.00390625, 1.01171875])])  # two ties
    memory, back, column = stored(nan(32), half), nan(32), stored(nan(32, 3), half)
    run(copies.narrow, wide, 32, memory)
    assert torch.equal(memory, stored(wide, half))
    run(copies.widen, memory, 32, back)
    assert torch.equal(back, memory.float())
    run(copies.scatter, wide, 32, column, 3 * column.element_size())
    assert torch.equal(column[:, 0], memory) and column[:, 1:].isnan().all()


@HALF
@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (96, 64)])
def test_rotate(dim, rotary, half):
    from cachefold.core.rotary import rotate

    source, factors, out = stored(numbers(dim), half), numbers(dim), nan(dim)
    cos, sin = stored(numbers(rotary), half), stored(numbers(rotary), half)
    run(vectors.make_rotate(dim, rotary, half, half), source, cos, sin, factors, out)
    four = source.float()[None, None, None]
    expected = rotate(four, cos.float()[None, None], sin.float()[None, None])[0, 0, 0] * factors
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@HALF
def test_blend(half):
    source, mean, share = stored(numbers(48), half), numbers(48), torch.tensor([0.3])
    expected = mean + (source.float() - mean) * 0.3
    run(vectors.make_blend(half), source, 48, share, mean)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
