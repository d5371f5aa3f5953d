"""Parallel attention against a token-by-token loop written from the definition."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.attention import blocked, reference
from cachefold.attention.call import AttentionCall
from cachefold.core.decisions import constrain
from cachefold.core.merging import merge_step, running_means

HEADS, KV_HEADS, DIM = 4, 2, 6


BACKENDS = pytest.mark.parametrize("attend", [reference.parallel, blocked.parallel])


def _inputs(tokens, seed, kind="hard", padding=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(2, HEADS, tokens, DIM)
    key, value = draw(2, KV_HEADS, tokens, DIM), draw(2, KV_HEADS, tokens, DIM)
    alpha = torch.sigmoid(draw(2, KV_HEADS, tokens))
    alpha = {"hard": alpha.round(), "soft": alpha, "merge": alpha * 0 + 1, "append": alpha * 0}[
        kind
    ]
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, : tokens // 3 if padding is None else padding] = False
    omega = torch.sigmoid(draw(2, KV_HEADS, tokens)) + 0.01
    return query, key, value, constrain(alpha, valid), omega, valid


def _call(query, key, value, alpha, omega, valid, window=None, **options):
    """A whole text, as the model asks for it without a cache."""
    mean_key, mean_value, _ = running_means(key, value, alpha, omega, window)
    return AttentionCall(
        query=query, exact_key=key, exact_value=value, merged_key=mean_key,
        merged_value=mean_value, alpha=alpha, valid=valid, scaling=0.5, **options,
    )  # fmt: skip


def _one_by_one(query, key, value, alpha, omega, valid, delay, window):
    """Hard decisions only: a Python list of entries per (batch, head)."""
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(HEADS):
            k = h // (HEADS // KV_HEADS)
            entries, state = [], None
            for i in range(query.shape[2]):
                j = i - delay
                if j >= 0 and valid[b, j]:
                    token = (t[b : b + 1, k : k + 1, j] for t in (key, value, alpha, omega))
                    state, mean_key, mean_value = merge_step(state, *token, window)
                    if alpha[b, k, j] == 1:
                        entries.pop()
                    entries.append((mean_key[0, 0], mean_value[0, 0]))
                ring = [t for t in range(max(0, j + 1), i + 1) if valid[b, t]]
                keys = [e[0] for e in entries] + [key[b, k, t] for t in ring]
                values = [e[1] for e in entries] + [value[b, k, t] for t in ring]
                if keys:
                    weights = torch.softmax(torch.stack(keys) @ query[b, h, i] * 0.5, 0)
                    out[b, h, i] = weights @ torch.stack(values)
    return out


@BACKENDS
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    window=st.sampled_from([None, 1, 12]),
    delay=st.sampled_from([0, 1, 4, 16, 50]),
    kind=st.sampled_from(["hard", "merge", "append"]),
    padding=st.integers(0, 10),
    seed=st.integers(0, 2**16),
)
def test_parallel_equals_token_by_token(attend, tokens, window, delay, kind, padding, seed):
    inputs = _inputs(tokens, seed, kind, min(padding, tokens - 1))
    expected = _one_by_one(*inputs, delay, window)
    actual = attend(_call(*inputs, window, delay=delay))
    real = inputs[-1][:, None, :, None]
    torch.testing.assert_close(actual * real, expected * real, rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("delay", [0, 2, 9])
def test_gradients_match_finite_differences(attend, delay, window):
    *inputs, valid = _inputs(7, 3, "soft", padding=2)
    inputs = [x[:, ..., :].clone().requires_grad_() for x in inputs]
    real = valid[:, None, :, None]

    def attention(*leaves):
        return attend(_call(*leaves, valid, window, delay=delay, softcap=4.0)) * real

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("rows", [1, 8, 256])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("delay", [0, 3, 40])
def test_blocked_equals_reference_with_gradients(delay, softcap, rows, monkeypatch):
    monkeypatch.setattr(blocked, "QUERY_ROWS", rows)
    *inputs, valid = _inputs(21, 0, "soft")
    gradients = []
    for attend in (reference.parallel, blocked.parallel):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(_call(*leaves, valid, delay=delay, softcap=softcap))
        out = out * valid[:, None, :, None]
        out.pow(2).sum().backward()
        gradients.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*gradients, strict=True):
        if a is None:  # a delay longer than the text never uses the merged form
            assert b is None
            continue
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_garbage_behind_closed_entries_does_not_leak():
    inputs = _inputs(5, 2)
    closed = torch.full((2, KV_HEADS, 3, DIM), torch.nan, dtype=torch.float64)
    mask = torch.zeros(2, KV_HEADS, 3, dtype=torch.bool)
    with_buffer = reference.parallel(
        _call(*inputs, delay=2, closed_key=closed, closed_value=closed, closed_mask=mask)
    )
    without = reference.parallel(_call(*inputs, delay=2))
    real = inputs[-1][:, None, :, None]
    assert with_buffer.isfinite().all()
    torch.testing.assert_close(with_buffer * real, without * real)


@pytest.mark.parametrize("name", ["blocked", "call", "reference"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
