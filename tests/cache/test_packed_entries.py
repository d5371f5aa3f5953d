"""Packed entries: what is exact, what is packed, every byte counted, nothing lost on the way."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachefold.cache import packed, packed_entries
from cachefold.cache.codecs import PAGE, get_codec
from cachefold.cache.packed import SINKS, Shape, packed_count
from cachefold.cache.packed_entries import PackedEntries
from cachefold.core.pages import gather, slots
from tests.cache.texts import HEADS, poison_packed

D, DV = 5, 7


def new_entries(batch: int, codec: str, page_size: int) -> PackedEntries:
    shape = Shape(batch, HEADS, page_size, D, DV, torch.float32)
    return PackedEntries(shape, get_codec(codec), "cpu")


class Lists:
    """Entries that come, are selected and loaded; beside them the rows that a head must read."""

    def __init__(self, batch: int, codec: str, page_size: int) -> None:
        self.codec, self.page_size = codec, page_size
        self.entries = new_entries(batch, codec, page_size)
        self.rows = [[torch.zeros(0, D + DV) for _ in range(HEADS)] for _ in range(batch)]
        self.weights = [[torch.zeros(0) for _ in range(HEADS)] for _ in range(batch)]

    def select(self, what: list[int]) -> None:
        rows = [row % len(self.rows) for row in what] if self.rows else []
        predicted = self.entries.nbytes_at(torch.tensor(rows, dtype=torch.int64))
        self.entries.select(torch.tensor(rows, dtype=torch.int64))
        self.rows = [list(self.rows[row]) for row in rows]
        self.weights = [list(self.weights[row]) for row in rows]
        assert self.entries.nbytes() == predicted

    def load(self) -> None:
        tensors = self.entries.tensors()
        self.entries = new_entries(len(self.rows), self.codec, self.page_size)
        self.entries.load(copy.deepcopy(tensors))

    def append(self, count: int, seed: int) -> None:
        """In the call that brings them new entries are exact; then full pages are packed."""
        generator = torch.Generator().manual_seed(seed)
        new = torch.rand(len(self.rows), HEADS, count, generator=generator) < 0.6
        vectors = torch.randn(int(new.sum()), D + DV, generator=generator)
        mass = torch.rand(len(vectors), generator=generator)
        predicted = self.entries.nbytes_with(self.entries.lengths + new.sum(-1))
        read = self.entries.append(new, vectors[:, :D], vectors[:, D:], 0, mass)
        assert self.entries.nbytes() == predicted
        for (b, k, _), vector, weight in zip(new.nonzero().tolist(), vectors, mass, strict=True):
            self.rows[b][k] = torch.cat([self.rows[b][k], vector[None]])
            self.weights[b][k] = torch.cat([self.weights[b][k], weight[None]])
        self.check_rows(read)
        for b, heads in enumerate(self.rows):
            for k, rows in enumerate(heads):
                old = len(rows) - int(new[b, k].sum())
                heads[k] = packed_again(rows, self.weights[b][k], self.codec, old)

    def check_rows(self, read: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Attention reads exactly the rows in what `read` gives it."""
        pages, table = read
        key, value = gather(pages, self.page_size, D, table)
        there = slots(self.entries.lengths, table.shape[2], self.page_size)
        both = torch.cat([key, value], -1)
        assert len(both) == len(self.rows)
        for b, heads in enumerate(self.rows):
            for k, rows in enumerate(heads):
                assert torch.equal(both[b, k][there[b, k]], rows)

    def check_invariants(self) -> None:
        """Full pages are packed, no page is lost, and bytes are what the tensors take."""
        entries, lists = self.entries, self.entries.lists
        assert torch.equal(lists.lengths, packed_count(entries.lengths))
        assert torch.equal((lists.table >= 0).sum(-1), lists.lengths // PAGE)
        owned = lists.table[lists.table >= 0].tolist()
        assert sorted(owned + lists.pool.free) == list(range(lists.pool.num_pages))
        assert lists.pool.data.dtype == torch.uint8
        tensors = [lists.pool.data, lists.table, lists.lengths, entries.lengths]
        tensors += entries.exact.values()
        assert entries.nbytes() == sum(t.untyped_storage().nbytes() for t in tensors)
        beside = 4 if "mass" in entries.exact else 0
        exact = int((entries.lengths - lists.lengths).sum()) * ((D + DV) * 4 + beside)
        assert entries.kept_nbytes() == len(owned) * entries.codec.page_nbytes(D, DV) + exact


def packed_again(rows: torch.Tensor, weights: torch.Tensor, codec: str, old: int) -> torch.Tensor:
    """Rows with the pages that became full since there were `old` rows as the codec makes them."""
    first, last = (int(packed_count(torch.tensor(n))) for n in (old, len(rows)))
    rows = rows.clone()
    for start in range(SINKS + first, SINKS + last, PAGE):
        page, coder = rows[None, start : start + PAGE], get_codec(codec)
        codes = coder.encode(page[..., :D], page[..., D:], weights[None, start : start + PAGE])
        rows[start : start + PAGE] = torch.cat(coder.decode(codes, D, DV), -1)[0]
    return rows


APPEND = st.tuples(st.just("append"), st.integers(1, 90), st.integers(0, 10**6))
SELECT = st.tuples(st.just("select"), st.lists(st.integers(0, 10), max_size=4))
LOAD = st.tuples(st.just("load"))


@pytest.mark.parametrize("codec", ["int8", "mixed", "kvquant-3"])
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), page_size=st.sampled_from([16, 32]),
    actions=st.lists(st.one_of(APPEND, APPEND, SELECT, LOAD), max_size=8),
)  # fmt: skip
# The kept request is the shorter one, and its exact entries stay as wide as the longer had them.
@example(
    batch=2, page_size=16, actions=[("append", 22, 0), ("select", [1]), ("append", 1, 0)]
)  # fmt: skip
def test_entries_are_exact_when_new_then_packed(codec, batch, page_size, actions):
    lists = Lists(batch, codec, page_size)
    for action, *what in actions:
        poison_packed(lists.entries)
        getattr(lists, action)(*what)
        lists.check_invariants()
        poison_packed(lists.entries)
        lists.check_rows(lists.entries.read())


@pytest.mark.parametrize("module", [packed, packed_entries])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
