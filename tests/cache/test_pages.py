"""Pages: every entry of a head in its own pages, none shared, none lost, none leaking."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from cachefold.attention import reference
from cachefold.attention.call import StepCall
from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.cache.entries import PagedEntries
from cachefold.cache.pages import SPARE, PagePool
from cachefold.cache.ring import STEPS_AHEAD
from cachefold.core.accounting import entries_kept
from cachefold.core.decisions import constrain
from cachefold.core.tokens import Tokens
from tests.cache.texts import (
    HEADS,
    Text,
    as_rows,
    expected_rows,
    expected_step,
    make_text,
    poison,
    poison_pages,
    run_step,
    stream_rows,
)  # fmt: skip


def new_entries(batch: int, page_size: int = 16) -> PagedEntries:
    return PagedEntries(batch, HEADS, PagePool(page_size, 2, 3, torch.float64, "cpu"))


def check_invariants(entries: PagedEntries, ahead: int = 0) -> None:
    """Every page has one owner or is free; a head has the pages that it needs.

    Beyond them it has at most those of the next `ahead` entries.
    """
    pool = entries.pool
    owned = entries.table[entries.table >= 0].tolist()
    assert sorted(owned + pool.free) == list(range(pool.num_pages))
    held = (entries.table >= 0).sum(-1)
    assert (held >= -(-entries.lengths // pool.page_size)).all()
    assert (held <= -(-(entries.lengths + ahead) // pool.page_size)).all()
    column = torch.arange(entries.table.shape[2])
    assert torch.equal(entries.table >= 0, column < held[..., None])
    assert entries.table.dtype == torch.int32
    assert pool.nbytes() == pool.num_pages * pool.page_nbytes
    assert pool.used_nbytes() == len(owned) * pool.page_nbytes


def rows_of(entries: PagedEntries) -> list[list[list[float]]]:
    """Key + value of every entry, per request and head, as attention sees them."""
    poison_pages(entries)
    key, value, mask = entries.padded()
    both = torch.cat([key, value], -1)
    assert not both[mask].isnan().any()
    return [[both[b, k][mask[b, k]].tolist() for k in range(HEADS)] for b in range(len(key))]


APPEND = st.tuples(st.just("append"), st.integers(1, 40), st.integers(0, 10**6))
SELECT = st.tuples(st.just("select"), st.lists(st.integers(0, 10), max_size=4), st.just(0))


@pytest.mark.parametrize("page_size", [16, 32])
@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), actions=st.lists(st.one_of(APPEND, APPEND, SELECT), max_size=10))
def test_pages_equal_padded_lists(page_size, batch, actions):
    entries = new_entries(batch, page_size)
    padded: list[list[list[list[float]]]] = [[[] for _ in range(HEADS)] for _ in range(batch)]
    for kind, what, seed in actions:
        if kind == "select":
            rows = [row % len(padded) for row in what] if padded else []
            predicted = entries.nbytes_at(torch.tensor(rows, dtype=torch.int64))
            entries.select(torch.tensor(rows, dtype=torch.int64))
            padded = [[list(head) for head in padded[row]] for row in rows]
            assert entries.nbytes() == predicted
        else:
            generator = torch.Generator().manual_seed(seed)
            new = torch.rand(len(padded), HEADS, what, generator=generator) < 0.6
            vectors = torch.rand(int(new.sum()), 5, generator=generator, dtype=torch.float64)
            predicted = entries.nbytes_with(entries.lengths + new.sum(-1))
            entries.append(new, vectors[:, :2], vectors[:, 2:], spare_nbytes=0)
            assert entries.nbytes() == predicted
            for (b, k, _), vector in zip(new.nonzero().tolist(), vectors.tolist(), strict=True):
                padded[b][k].append(vector)
        check_invariants(entries)
        assert rows_of(entries) == padded


EXTEND = st.tuples(st.just("extend"), st.integers(1, 70))
ROWS = st.tuples(
    st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 5), min_size=1, max_size=3)
)
RESET = st.tuples(st.just("reset"), st.integers(1, 3))
STEPS = st.tuples(st.just("steps"), st.integers(1, 20))
COPY = st.tuples(st.just("copy"), st.booleans())


def joined(texts: list[Text]) -> Text:
    dims = {"cos": 1, "sin": 1, "valid": 1}
    return Text(
        **{n: torch.cat([vars(t)[n] for t in texts], dims.get(n, 2)) for n in vars(texts[0])}
    )


def check_step(layer: FoldedLayer, text: Text) -> None:
    """The last token of `text` in place."""
    last = text.valid.shape[1] - 1
    got = run_step(layer, text, last)
    for b in range(len(got)):
        for k in range(HEADS):
            want = expected_step(text, b, k, last, layer.delay, layer.window)
            torch.testing.assert_close(got[b, k], want, rtol=1e-9, atol=1e-9)
    check_invariants(layer.closed, ahead=max(STEPS_AHEAD, layer.ahead))


def check_extend(layer: FoldedLayer, text: Text, start: int) -> None:
    """The tokens of `text` from `start` on, at once."""
    poison(layer)
    last = text.valid.shape[1] - 1
    stream = layer.extend(Tokens(*text.part(start, last + 1)))
    for b in range(len(text.valid)):
        for k in range(HEADS):
            got = as_rows(stream_rows(stream, b, k, -1, layer.delay))
            want = as_rows(expected_rows(text, b, k, last, layer.delay, layer.window))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("delay", "window"), [(0, None), (1, None), (4, None), (16, None), (4, 3)])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([0.0, 0.3, 0.7]),
    actions=st.lists(
        st.one_of(EXTEND, EXTEND, STEPS, STEPS, ROWS, RESET, COPY), min_size=2, max_size=9
    ),
    page_size=st.sampled_from([16, 32]),
)
def test_a_layer_goes_on_after_any_change(delay, window, seed, rate, actions, page_size):
    layer, batch, past = FoldedLayer(delay, window, page_size), 2, []
    for action, (kind, what) in enumerate(actions):
        if kind == "reset":
            layer.reset()
            batch, past = what, []
            assert layer.nbytes() == 0
        elif kind == "extend":
            seen = past[0].valid.shape[1] if past else 0
            past = [joined([*past, make_text(seed + action, what, [0] * batch, rate)])]
            check_extend(layer, past[0], seen)
            check_invariants(layer.closed, ahead=STEPS_AHEAD)
        elif kind == "steps" and layer.can_step:
            for i in range(what):
                past = [joined([*past, make_text(seed + action + 100 * i, 1, [0] * batch, rate)])]
                check_step(layer, past[0])
        elif kind == "copy":
            other = copy.deepcopy(layer)
            if what and past:
                other = FoldedLayer(delay, window, page_size)
                other.load_tensors(layer.tensors(), layer.seen)
            layer = other
        elif past and kind in ("reorder", "select"):
            rows = torch.tensor([row % batch for row in what])
            predicted = layer.nbytes_at(rows)
            layer.reorder_cache(rows) if kind == "reorder" else layer.batch_select_indices(rows)
            batch, past = len(rows), [Text(*(x[rows] for x in vars(past[0]).values()))]
            assert layer.nbytes() == predicted
            check_invariants(layer.closed, ahead=STEPS_AHEAD)
    if past:
        kept = entries_kept(constrain(past[0].alpha, past[0].valid), past[0].valid, delay)
        assert layer.entries().tolist() == kept.tolist()


def test_freed_pages_are_reused_and_beams_swap_without_growth():
    entries = new_entries(2)
    full = torch.ones(2, HEADS, 64, dtype=torch.bool)
    entries.append(full, torch.rand(256, 2), torch.rand(256, 3))
    pages, before = entries.pool.num_pages, entries.table.clone()
    entries.select(torch.tensor([1, 0]))
    assert torch.equal(entries.table, before[[1, 0]])
    data = entries.pool.data.data_ptr()
    for _ in range(5):
        entries.select(torch.tensor([1, 1]))
    assert entries.pool.num_pages == pages and entries.pool.data.data_ptr() == data
    assert rows_of(entries)[0] == rows_of(entries)[1]


def test_a_wrong_index_changes_nothing():
    entries = new_entries(2)
    entries.append(torch.ones(2, HEADS, 9, dtype=torch.bool), torch.rand(36, 2), torch.rand(36, 3))
    before = rows_of(entries)
    for rows in ([1, 2], [-1]):
        with pytest.raises(IndexError):
            entries.select(torch.tensor(rows))
        check_invariants(entries)
        assert rows_of(entries) == before


def test_a_mostly_free_pool_shrinks():
    entries = new_entries(4)
    full = torch.ones(4, HEADS, 64, dtype=torch.bool)
    entries.append(full, torch.rand(512, 2), torch.rand(512, 3))
    kept = rows_of(entries)[2]
    entries.select(torch.tensor([2]))
    check_invariants(entries)
    assert entries.pool.num_pages == HEADS * 4 and rows_of(entries) == [kept]


def test_a_pool_grows_in_chunks():
    pool = PagePool(16, 2, 2, torch.float32, "cpu")
    pool.take(10 * SPARE)
    assert pool.num_free == 0
    pool.take(1)
    assert pool.num_pages == 10 * SPARE + 1 + 10
    pool.take(11, spare_nbytes=2 * pool.page_nbytes + 1)
    assert pool.num_free == 2


@pytest.mark.parametrize("page_size", [0, 8, 64])
def test_page_size_is_checked(page_size):
    with pytest.raises(ValueError, match=r"page_size must be one of \(16, 32\)"):
        FoldedLayer(4, page_size=page_size)


def fold_step(layer: FoldedLayer, new: Tokens) -> torch.Tensor:
    reference.fold(
        StepCall(
            query=new.key, new=new, ring=layer.ring, turn=layer.turn, tail=layer.tail,
            pages=layer.closed.pool.data, page_size=layer.page_size, table=layer.closed.table,
            lengths=layer.closed.lengths, scaling=1.0,
        )
    )  # fmt: skip
    return new.value


def llama_cache(tokens: int, batch: int, ratio: float, step: int | None) -> FoldedCache:
    """Filled by decisions imposed at a ratio of all entries, ring included; bfloat16.

    With `step`, the last 200 tokens come so many at a time, and one at a time in place.
    """
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, hidden_size=576
    )
    cache = FoldedCache(config, [0, 1], delay=16)
    generator = torch.Generator().manual_seed(0)
    folded = tokens - 16
    rate = 1 - (tokens / ratio - 16) / folded
    for layer in cache.layers:
        alpha = (torch.rand(batch, 3, tokens, generator=generator) < rate).float()
        vectors = torch.randn(batch, 3, tokens, 64, generator=generator).bfloat16()
        angle = torch.rand(1, tokens, 64, generator=generator).bfloat16()
        starts = [0] if step is None else [0, *range(tokens - 200, tokens, step)]
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            part = slice(start, stop)
            new = Tokens(
                vectors[:, :, part], vectors[:, :, part], angle[:, part], angle[:, part],
                alpha[:, :, part], torch.ones(batch, 3, stop - start),
                torch.ones(batch, stop - start, dtype=torch.bool),
            )  # fmt: skip
            if start and step == 1:
                layer.step(new, lambda layer, new=new: fold_step(layer, new))
            else:
                layer.extend(new)
    return cache


@pytest.mark.parametrize("ratio", [2.0, 4.0])
@pytest.mark.parametrize(
    ("tokens", "batch", "step"), [(2048, 1, None), (2048, 2, 50), (2048, 2, 1)]
)
def test_saved_memory_is_real(tokens, batch, ratio, step):
    cache = llama_cache(tokens, batch, ratio, step)
    cr = cache.compression_ratio()
    assert cr == pytest.approx(ratio, rel=0.05)
    excess = cache.allocated_nbytes() * cr / cache.dense_nbytes()
    print(f"{tokens} tokens x {batch}, cr {cr:.3f}: allocated / (dense / cr) = {excess:.4f}")
    assert excess <= 1.06
