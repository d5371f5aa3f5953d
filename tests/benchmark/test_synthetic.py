"""Imposed ratios are kept exactly, and calls are what the contract asks for."""

from __future__ import annotations

import pytest
import torch

from cachefold.attention import reference
from cachefold.benchmark.synthetic import (
    Case,
    Shape,
    merges,
    moved_nbytes,
    paged_call,
    ragged_lengths,
    step_call,
)
from tests.models.tiny import tiny_model

SMALL = Shape(layers=2, heads=4, kv_heads=2, head_dim=8, delay=4)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cr", [1.0, 1.1, 2.0, 3.7, 8.0])
@pytest.mark.parametrize(("batch", "heads", "tokens"), [(1, 1, 160), (1, 3, 512), (8, 3, 1001)])
def test_lengths_keep_the_ratio(batch, heads, tokens, cr):
    lengths = ragged_lengths(batch, heads, tokens, cr, 16, _generator())
    assert lengths.shape == (batch, heads)
    assert abs(int((lengths + 17).sum()) - batch * heads * tokens / cr) <= 0.5
    assert lengths.min() >= 1 and lengths.max() <= tokens - 17
    if cr == 1.0:
        assert (lengths == tokens - 17).all()
    elif batch * heads > 1:
        spread = (lengths.max() - lengths.min()) / lengths.float().mean()
        assert spread > (0.1 if cr < 2 else 0.5)


def test_lengths_follow_the_seed():
    first, again, other = (
        ragged_lengths(2, 3, 512, 4.0, 16, _generator(seed)) for seed in (1, 1, 2)
    )
    assert first.equal(again) and not first.equal(other)


def test_merges_leave_the_lengths():
    lengths = torch.tensor([[3, 7], [1, 20]])
    table = merges(lengths, 40, 5, 2.0, 8, _generator())
    assert table.shape == (2, 2, 45) and not table[..., 0].any()
    assert (~table[..., :32]).sum(-1).equal(lengths + 1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_table_has_a_page_for_every_slot(shuffled):
    call = step_call(SMALL, Case(3, 150, 3.0), torch.float32, steps=40, shuffled=shuffled)
    owned = call.table[call.table >= 0]
    assert owned.sort().values.equal(torch.arange(len(call.pages), dtype=torch.int32))
    assert owned.equal(owned.sort().values) != shuffled
    pages = (call.table >= 0).sum(-1)
    assert (pages * call.page_size >= call.lengths + 40).all()
    assert (pages * call.page_size < call.lengths + 40 + call.page_size).all()
    for _ in range(40):
        assert reference.step(call).isfinite().all()


def test_paged_call_sees_what_the_step_sees():
    call = step_call(SMALL, Case(2, 100, 2.0), torch.float64)
    call.tail.valid.zero_()
    call.ring.valid.zero_()
    call.new.value.zero_()
    alone, after = reference.attend(paged_call(call)), reference.step(call)
    # The step adds the new token, with value 0, to the same closed entries.
    ratio = after / alone
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio)) and (ratio < 1).all()


def test_moved_bytes_count_entries():
    calls = [step_call(SMALL, Case(2, 200, cr), torch.bfloat16) for cr in (1.0, 4.0)]
    entries = [int(call.lengths.sum()) for call in calls]
    saved = (entries[0] - entries[1]) * 2 * SMALL.head_dim * 2
    assert moved_nbytes(calls[0]) - moved_nbytes(calls[1]) == saved


def test_shape_of_a_model():
    shape = Shape.of(tiny_model("Qwen3").config, delay=3)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 4, 2, 8)
    assert shape.delay == 3
    # The defaults are what the zoo's model says of itself.
    assert Shape() == Shape(layers=30, heads=9, kv_heads=3, head_dim=576 // 9)
