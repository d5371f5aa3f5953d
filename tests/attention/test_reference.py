"""Parallel attention against a token-by-token loop written from the definition."""

from __future__ import annotations

import pytest
import torch

from cachefold.attention import blocked, reference
from cachefold.core.decisions import constrain
from cachefold.core.merging import merge_step, running_means

HEADS, KV_HEADS, DIM = 4, 2, 6


def _inputs(tokens, seed, kind="hard"):
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
    valid[0, : tokens // 3] = False
    omega = torch.sigmoid(draw(2, KV_HEADS, tokens)) + 0.01
    return query, key, value, constrain(alpha, valid), omega, valid


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


@pytest.mark.parametrize("kind", ["hard", "merge", "append"])
@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("delay", [0, 1, 4, 16])
@pytest.mark.parametrize("attend", [reference.parallel, blocked.parallel])
def test_parallel_equals_token_by_token(attend, delay, window, kind):
    for tokens in (1, 13, 30):
        query, key, value, alpha, omega, valid = _inputs(tokens, tokens, kind)
        expected = _one_by_one(query, key, value, alpha, omega, valid, delay, window)
        mean_key, mean_value, _ = running_means(key, value, alpha, omega, window)
        actual = attend(
            query, key, value, mean_key, mean_value, alpha, delay=delay, scaling=0.5, valid=valid
        )
        real = valid[:, None, :, None]
        torch.testing.assert_close(actual * real, expected * real, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("delay", [0, 3, 40])
def test_blocked_equals_reference_with_gradients(delay, softcap):
    query, key, value, alpha, omega, valid = _inputs(21, 0, "soft")
    gradients = []
    for attend in (reference.parallel, blocked.parallel):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, alpha, omega)]
        mean_key, mean_value, _ = running_means(*leaves[1:])
        out = attend(
            leaves[0], leaves[1], leaves[2], mean_key, mean_value, leaves[3],
            delay=delay, scaling=0.5, valid=valid, softcap=softcap,
        )  # fmt: skip
        (out * valid[:, None, :, None]).pow(2).sum().backward()
        gradients.append([out * valid[:, None, :, None], *(leaf.grad for leaf in leaves)])
    for a, b in zip(*gradients, strict=True):
        if a is None:  # a delay longer than the text never uses the merged form
            assert b is None
            continue
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_garbage_behind_closed_entries_does_not_leak():
    query, key, value, alpha, omega, valid = _inputs(5, 2)
    mean_key, mean_value, _ = running_means(key, value, alpha, omega)
    closed = torch.full((2, KV_HEADS, 3, DIM), torch.nan, dtype=torch.float64)
    mask = torch.zeros(2, KV_HEADS, 3, dtype=torch.bool)
    options = {"delay": 2, "scaling": 0.5, "valid": valid}
    inputs = (query, key, value, mean_key, mean_value, alpha)
    with_buffer = reference.parallel(
        *inputs, **options, closed_key=closed, closed_value=closed, closed_mask=mask
    )
    without = reference.parallel(*inputs, **options)
    real = valid[:, None, :, None]
    assert with_buffer.isfinite().all()
    torch.testing.assert_close(with_buffer * real, without * real)
