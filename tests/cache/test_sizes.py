"""Layers whose entries are weighed by the number of tokens they hold (proportional attention)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cachefold.cache import FoldedLayer
from cachefold.cache.codecs import get_codec, list_codecs
from cachefold.core.pages import gather
from cachefold.core.tokens import Tokens
from tests.cache.texts import DIM, HEADS, Text, cut, expected_rows, make_text, poison, run_step

WEIGHT = torch.tensor([0.5, 2.0], dtype=torch.float64)


def tokens(text: Text, start: int, stop: int) -> Tokens:
    part = text.part(start, stop)
    return Tokens(*part, torch.ones_like(part[5]))


def members(text: Text, b: int, k: int, i: int, delay: int) -> list[int]:
    """Tokens in each entry that query i sees, the open one last."""
    entries: list[int] = []
    for j in range(i - delay + 1):
        if text.valid[b, j]:
            merges = j > 0 and bool(text.valid[b, j - 1]) and text.alpha[b, k, j] == 1
            entries = [*entries[:-1], entries[-1] + 1] if merges else [*entries, 1]
    return entries


def feed(layer: FoldedLayer, text: Text, bounds: list[int]):
    for start, stop in itertools.pairwise(bounds):
        poison(layer)
        stream = layer.extend(tokens(text, start, stop), None, WEIGHT)
    return stream


def check_last(stream, text: Text, i: int, delay: int) -> None:
    """Keys, values, biases and sizes that the last of the new tokens sees."""
    key, value = gather(stream.pages, 16, DIM + 1, stream.table)
    for b, k in itertools.product(range(len(text.valid)), range(HEADS)):
        counts, closed = members(text, b, k, i, delay), int(stream.visible[b, k, -1])
        rows = torch.tensor(expected_rows(text, b, k, i, delay, None)[:closed])
        rows = rows.double().reshape(closed, 2 * DIM)
        torch.testing.assert_close(key[b, k, :closed, :DIM], rows[:, :DIM])
        torch.testing.assert_close(value[b, k, :closed], rows[:, DIM:])
        want = [float(WEIGHT[k]) * math.log(count) for count in counts]
        assert key[b, k, :closed, DIM].tolist() == pytest.approx(want[:closed])
        if stream.open.valid[b, -1]:
            assert len(counts) == closed + 1
            assert stream.open.size[b, k, -1].item() == counts[-1]


@pytest.mark.parametrize("delay", [0, 4, 20])
@pytest.mark.parametrize("sizes", [[60], [1], [5, 1, 9]])
def test_entries_carry_the_logarithm_of_their_tokens(delay, sizes):
    for seed in range(3):
        text = make_text(seed, 60, [0, 5], 0.6)
        for end in (25, 60):
            stream = feed(FoldedLayer(delay), text, cut(end, sizes))
            check_last(stream, text, end - 1, delay)


@pytest.mark.parametrize("delay", [0, 4, 16])
def test_steps_leave_what_extending_leaves(delay):
    text = make_text(4, 80, [0, 5], 0.6)
    layer, other = FoldedLayer(delay), FoldedLayer(delay)
    feed(layer, text, [0, 20])
    for i in range(20, 79):
        run_step(layer, text, i, WEIGHT)
    check_last(feed(layer, text, [79, 80]), text, 79, delay)
    feed(other, text, [0, 80])
    assert torch.equal(layer.lengths, other.lengths)
    torch.testing.assert_close(layer.tail.size, other.tail.size)


@pytest.mark.parametrize("operation", ["saved", "selected", "beams"])
def test_the_sizes_move_with_the_state(operation):
    text, layer = make_text(1, 60, [0, 5], 0.6), FoldedLayer(4)
    feed(layer, text, [0, 30])
    run_step(layer, text, 30, WEIGHT)
    rows = [0, 1] if operation == "saved" else [1] if operation == "selected" else [1, 0]
    if operation == "saved":
        held = {name: tensor.clone() for name, tensor in layer.tensors().items()}
        layer = FoldedLayer(4)
        layer.load_tensors(held, 31)
    else:
        layer._select(torch.tensor(rows))
    other = Text(*(x[rows] for x in vars(text).values()))
    check_last(feed(layer, other, [31, 40, 41, 60]), other, 59, 4)


@pytest.mark.parametrize("codec", list_codecs())
def test_packed_entries_keep_their_bias(codec):
    text, layer = make_text(3, 900, [0], 0.8), FoldedLayer(4, None, codec=get_codec(codec))
    stream = feed(layer, text, [0, 900])
    key, _ = gather(stream.pages, 16, DIM + 1, stream.table)
    count = int(layer.lengths[0, 0])
    want = [float(WEIGHT[0]) * math.log(n) for n in members(text, 0, 0, 899, 4)]
    assert count > 100
    assert key[0, 0, :count, DIM].tolist() == pytest.approx(want[:count], abs=1e-6)


def test_a_bias_counts_as_bytes_of_an_entry_but_not_of_a_dense_one():
    text = make_text(0, 60, [0], 0.0)
    plain, sized = FoldedLayer(4), FoldedLayer(4)
    plain.extend(Tokens(*text.part(0, 60)))
    feed(sized, text, [0, 60])
    assert plain.entry_nbytes() == sized.entry_nbytes() == 2 * DIM * 8
    assert sized.closed.entry_nbytes() == (2 * DIM + 1) * 8
    opened = int(sized.tail.valid.sum()) * HEADS
    assert sized.kept_nbytes() - plain.kept_nbytes() == 8 * (int(sized.lengths.sum()) + opened)


def test_a_cache_of_another_policy_is_refused():
    text, layer = make_text(0, 30, [0], 0.5), FoldedLayer(4)
    feed(layer, text, [0, 20])
    with pytest.raises(ValueError, match="proportional=True and the model has .*False"):
        layer.extend(Tokens(*text.part(20, 30)))
