"""The central identity: parallel form == recurrence."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.core.merging import merge_sequential, running_means

WINDOWS = [None, 1, 12]


def _random(batch, heads, tokens, dim, seed, kind="mixed"):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    key, value = make(batch, heads, tokens, dim) - 0.5, make(batch, heads, tokens, dim + 1) - 0.5
    alpha, omega = make(batch, heads, tokens), make(batch, heads, tokens) + 1e-3
    if kind == "mixed":
        alpha = torch.where(alpha < 0.3, 0.0, torch.where(alpha > 0.7, 1.0, alpha))
    if kind in ("merge", "append"):
        alpha = torch.full_like(alpha, float(kind == "merge"))
    return key, value, alpha, omega


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 140),
    window=st.sampled_from(WINDOWS),
    kind=st.sampled_from(["mixed", "soft", "merge", "append"]),
    seed=st.integers(0, 2**16),
)
def test_parallel_equals_sequential(tokens, window, kind, seed):
    inputs = _random(2, 2, tokens, 3, seed, kind)
    expected = merge_sequential(*inputs, window)
    actual = running_means(*inputs, window)
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_parallel_equals_sequential_over_nested_blocks():
    inputs = _random(1, 1, 1100, 2, 0)
    for a, b in zip(merge_sequential(*inputs), running_means(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
def test_window_bounds_what_an_entry_averages(window):
    key, value, alpha, omega = _random(1, 1, 30, 2, 1, "merge")
    span = window or 30
    expected = (omega[0, 0, -span:, None] * key[0, 0, -span:]).sum(0) / omega[0, 0, -span:].sum()
    actual = running_means(key, value, alpha, omega, window)[0][0, 0, -1]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["soft", "mixed"])
@pytest.mark.parametrize("tokens", [6, 37])
def test_gradients_match_finite_differences(window, kind, tokens):
    inputs = [x.requires_grad_() for x in _random(1, 1, tokens, 2, 3, kind)]
    # gradcheck moves alpha a little beyond [0, 1]; the recurrence is polynomial there too.
    assert torch.autograd.gradcheck(lambda *x: running_means(*x, window), inputs)


def test_half_precision_inputs_are_summed_in_float32():
    key, value, alpha, omega = _random(1, 1, 40, 2, 5, "merge")
    means = running_means(key.bfloat16(), value.bfloat16(), alpha.bfloat16(), omega.bfloat16())
    assert all(part.dtype == torch.float32 for part in means)


@pytest.mark.parametrize("window", WINDOWS)
def test_autocast_does_not_reach_the_sums(window):
    inputs = [x.float() for x in _random(1, 2, 100, 4, 6, "merge")]
    expected = running_means(*inputs, window)
    with torch.autocast("cpu", torch.bfloat16):
        actual = running_means(*inputs, window)
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["accounting", "decisions", "merging", "names", "rotary", "schedule"]
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.core.{name}"))
    assert result.attempted and not result.failed
