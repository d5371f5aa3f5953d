"""Attention against a token-by-token loop written from the definition."""

from __future__ import annotations

import doctest
import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.attention import blocked, reference
from cachefold.attention.call import ParallelCall
from cachefold.core.decisions import constrain
from cachefold.core.merging import merge_step, running_means, running_sizes, size_bias
from tests.attention import lists
from tests.attention.lists import DIM, HEADS, KV_HEADS

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


def _call(query, key, value, alpha, omega, valid, window=None, weight=None, **options):
    """A whole text, as the model asks for it without a cache."""
    mean_key, mean_value, _ = running_means(key, value, alpha, omega, window)
    if weight is not None:
        options["merged_bias"] = size_bias(running_sizes(alpha), weight)
    return ParallelCall(
        query=query, exact_key=key, exact_value=value, merged_key=mean_key,
        merged_value=mean_value, alpha=alpha, valid=valid, scaling=0.5, **options,
    )  # fmt: skip


def _one_by_one(query, key, value, alpha, omega, valid, delay, window, weight=None):
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
                    size = 1 + (entries.pop()[2] if alpha[b, k, j] == 1 else 0)
                    entries.append((mean_key[0, 0], mean_value[0, 0], size))
                ring = [t for t in range(max(0, j + 1), i + 1) if valid[b, t]]
                keys = [e[0] for e in entries] + [key[b, k, t] for t in ring]
                values = [e[1] for e in entries] + [value[b, k, t] for t in ring]
                if keys:
                    scores = torch.stack(keys) @ query[b, h, i] * 0.5
                    for n, (_, _, size) in enumerate(entries if weight is not None else ()):
                        scores[n] += weight[k] * math.log(size)
                    weights = torch.softmax(scores, 0)
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
    weight=st.sampled_from([None, lists.WEIGHTS]),
    seed=st.integers(0, 2**16),
)
def test_parallel_equals_token_by_token(attend, tokens, window, delay, kind, padding, weight, seed):
    inputs = _inputs(tokens, seed, kind, min(padding, tokens - 1))
    expected = _one_by_one(*inputs, delay, window, weight)
    actual = attend(_call(*inputs, window, weight, delay=delay))
    real = inputs[-1][:, None, :, None]
    torch.testing.assert_close(actual * real, expected * real, rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("delay", [0, 2, 9])
def test_gradients_match_finite_differences(attend, delay, window):
    *inputs, valid = _inputs(7, 3, "soft", padding=2)
    inputs = [x.clone().requires_grad_() for x in [*inputs, lists.WEIGHTS]]
    real = valid[:, None, :, None]

    def attention(*leaves):
        *leaves, weight = leaves
        return attend(_call(*leaves, valid, window, weight, delay=delay, softcap=4.0)) * real

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


TEXTS = {
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 2),
    "tokens": st.integers(1, 40),
    "rate": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "padding": st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=1, max_size=2
    ),
    "page_size": st.sampled_from([16, 32]),
    "softcap": st.sampled_from([None, 1.5]),
    "damped": st.booleans(),
    "proportional": st.booleans(),
}


def _text(
    seed, batch, tokens, rate, padding, page_size, softcap, damped, delay, proportional=False
):
    factors = torch.ones(DIM, dtype=torch.float64)
    factors[-1] = 0.25
    return lists.make_text(
        seed, batch, tokens, rate, padding, delay=delay, page_size=page_size, softcap=softcap,
        factors=factors if damped else None, size_weight=lists.WEIGHTS if proportional else None,
    )  # fmt: skip


def _check(text, got, i):
    """Output (B, H, Dv) of token i; what a padding query gets means nothing."""
    for b in range(text.shape[0]):
        for h in range(HEADS) if text.tokens.valid[b, i] else ():
            want = lists.expected(text, b, h, i)
            torch.testing.assert_close(got[b, h], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 1, 4, 16])
@settings(max_examples=25, deadline=None)
@given(queries=st.integers(1, 40), **TEXTS)
def test_attend_equals_lists(delay, queries, **drawn):
    text = _text(**drawn, delay=delay)
    queries = min(queries, drawn["tokens"])
    out = reference.attend(lists.paged_call(text, queries))
    for q in range(queries):
        _check(text, out[:, :, q], drawn["tokens"] - queries + q)


@pytest.mark.parametrize("delay", [0, 1, 4, 16])
@settings(max_examples=25, deadline=None)
@given(**TEXTS)
def test_steps_equal_lists(delay, **drawn):
    text = _text(**drawn, delay=delay)
    call = lists.first_step(text)
    for i in range(drawn["tokens"]):
        call = lists.next_step(text, call, i)
        _check(text, reference.step(call)[:, :, 0], i)
        for b in range(drawn["batch"]):
            for k in range(KV_HEADS):
                closed, last = lists.groups(text, b, k, i)
                assert call.lengths[b, k] == len(closed)
                assert bool(call.tail.valid[b, 0]) == (last is not None)
        assert int(call.turn) == ((i + 1) % delay if delay else 0)


def test_one_position_for_the_whole_batch():
    """`cos` and `sin` of a new token may have batch 1."""
    text = _text(0, 2, 20, 0.5, [(0, 0)], 16, None, False, 4)
    text.tokens.cos[1], text.tokens.sin[1] = text.tokens.cos[0], text.tokens.sin[0]
    call = lists.first_step(text)
    for i in range(20):
        call = lists.next_step(text, call, i)
        new = replace(call.new, cos=call.new.cos[:1], sin=call.new.sin[:1])
        _check(text, reference.step(replace(call, new=new))[:, :, 0], i)


def test_the_mean_stays_in_float32():
    """In bfloat16, 300 merged tokens of value 1 and one of 2 keep their true mean."""
    text = _text(0, 1, 1, 1.0, [(0, 0)], 16, None, False, 0)
    call, wide = lists.first_step(text), torch.float32
    half = {
        name: run_to(getattr(call, name), torch.bfloat16 if name == "new" else wide)
        for name in ("new", "tail")
    }
    call = replace(
        call, query=call.query.bfloat16(), pages=call.pages.bfloat16(),
        ring=run_to(call.ring, torch.bfloat16), **half,
    )  # fmt: skip
    call.new.omega.fill_(1.0)
    for i in range(301):
        call.new.value.fill_(2.0 if i == 300 else 1.0)
        reference.step(call)
    torch.testing.assert_close(call.tail.value, torch.full_like(call.tail.value, 302 / 301))
    assert call.tail.value.dtype == wide and int(call.lengths.sum()) == 0


def run_to(run, dtype):
    """Keys and values in another dtype."""
    return replace(run, key=run.key.to(dtype), value=run.value.to(dtype))


@pytest.mark.parametrize("name", ["blocked", "call", "dispatch", "reference"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
