"""The folding layer against a token-by-token recurrence in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.cache import FoldedLayer
from cachefold.core.accounting import entries_kept
from cachefold.core.decisions import constrain
from cachefold.core.tokens import Tokens
from tests.cache.texts import (
    DIM,
    HEADS,
    ROTARY,
    Text,
    as_rows,
    cut,
    expected_rows,
    feed,
    make_text,
    stream_rows,
)  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("delay", [0, 1, 4, 20])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 28),
    padding=st.lists(st.integers(0, 6), min_size=1, max_size=2),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    trailing=st.sampled_from([0, 0, 2]),
)
def test_extend_equals_recurrence(window, delay, seed, tokens, padding, rate, sizes, trailing):
    text = make_text(seed, tokens, padding, rate, trailing)
    layer = FoldedLayer(delay, window)

    def check(stream, start, stop):
        for b in range(len(padding)):
            for k in range(HEADS):
                for i in range(start, stop):
                    got = as_rows(stream_rows(stream, b, k, i - start, delay))
                    want = as_rows(expected_rows(text, b, k, i, delay, window))
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    feed(layer, text, cut(tokens, sizes), check)
    assert layer.get_seq_length() == tokens
    kept = entries_kept(constrain(text.alpha, text.valid), text.valid, delay)
    assert layer.entries().tolist() == kept.tolist()


def test_mean_of_an_entry_stays_in_float32():
    """In bfloat16, 300 merged tokens of value 1 and one of 2 keep their true mean."""
    layer = FoldedLayer(0)
    one = torch.ones(1, 1, 1, DIM, dtype=torch.bfloat16)
    angle = torch.zeros(1, 1, ROTARY, dtype=torch.bfloat16)
    for step in range(301):
        x = one * (2 if step == 300 else 1)
        weight = torch.ones(1, 1, 1)
        valid = torch.ones(1, 1, dtype=torch.bool)
        layer.extend(Tokens(x, x, angle + 1, angle, weight, weight, valid))
    assert layer.tail.key[0, 0, 0, 0].item() == pytest.approx(302 / 301, rel=1e-6)
    assert layer.entries().item() == 1


def test_nan_at_padding_does_not_leak():
    text = make_text(0, 8, [3], 1.0)
    text.key[:, :, :3] = math.nan
    text.value[:, :, :3] = math.nan
    text.omega[:, :, :3] = math.nan
    stream = feed(FoldedLayer(0, None), text, [0, 8])
    for run in (stream.open, stream.exact):
        assert run.key.isfinite().all() and run.value.isfinite().all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_batch_operations_move_the_whole_state(operation, window):
    text = make_text(1, 24, [0, 5], 0.6)
    layer = FoldedLayer(4, window)
    feed(layer, text, [0, 12])
    index = {"reorder": [1, 1], "repeat": [0, 0, 1, 1], "select": [1]}[operation]
    if operation == "reorder":
        layer.reorder_cache(torch.tensor(index))
    elif operation == "repeat":
        layer.batch_repeat_interleave(2)
    else:
        layer.batch_select_indices(torch.tensor(index))
    other = Text(*(x[index] for x in vars(text).values()))

    def check(stream, start, stop):
        for b in range(len(index)):
            got = as_rows(stream_rows(stream, b, 0, -1, 4))
            torch.testing.assert_close(
                got, as_rows(expected_rows(other, b, 0, stop - 1, 4, window))
            )

    feed(layer, other, [12, 13, 20, 24], check)


def test_stored_slices_free_the_prompt():
    text = make_text(3, 600, [0], 1.0)
    layer = FoldedLayer(4)
    feed(layer, text, [0, 600])
    assert layer.nbytes() < text.key.numel() * 8 / 10


def test_delay_and_window_are_checked():
    for options in ({"delay": -1}, {"delay": 4, "window": 0}):
        with pytest.raises(ValueError, match="delay must be >= 0 and window >= 1"):
            FoldedLayer(**options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.float(), r"dtype torch.float64 \(got torch.float32\)"),
        (lambda x: x[:, :1], r"kv heads 2 \(got 1\)"),
        (lambda x: x[..., :4], r"head dim 6 \(got 4\)"),
        (lambda x: x[:1], r"batch 2 \(got 1\)"),
    ],
)
def test_a_cache_of_another_model_is_refused(change, match):
    text = make_text(0, 8, [0, 0], 0.5)
    layer = FoldedLayer(2)
    feed(layer, text, [0, 4])
    key, value, *rest = text.part(4, 8)
    with pytest.raises(ValueError, match=match):
        layer.extend(Tokens(change(key), change(value), *rest))


def test_closed_keys_are_scaled_after_their_rotation():
    text = make_text(5, 12, [0], 0.0)
    scale = torch.ones(DIM, dtype=torch.float64)
    scale[ROTARY - 1] = 0.25
    plain, scaled = FoldedLayer(2), FoldedLayer(2)
    feed(plain, text, [0, 12])
    scaled.extend(Tokens(*text.part(0, 12)), scale)
    assert plain.lengths.min() == 9
    (key, _, mask), (scaled_key, _, _) = plain.closed.padded(), scaled.closed.padded()
    torch.testing.assert_close(key[mask] * scale, scaled_key[mask])
