"""Packed slots: what is exact, what is packed, every byte counted, nothing lost on the way."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.cache import packed_slots, slots
from cachefold.cache.codecs import Vectors, get_codec, list_codecs
from cachefold.cache.packed_slots import EXACT, RECENT, SINKS, PackedSlots

HEADS, D, DV = 2, 5, 7


def new_slots(batch: int, codec: str) -> PackedSlots:
    return PackedSlots(batch, HEADS, D, DV, torch.float32, "cpu", get_codec(codec))


class Lanes:
    """Tokens that come to slots, one at a time, where random others go; kept without slots too."""

    def __init__(self, batch: int, codec: str, seed: int) -> None:
        self.codec, self.slots = codec, new_slots(batch, codec)
        self.random = torch.Generator().manual_seed(seed)
        self.position = torch.full((batch, HEADS, 0), -1)
        self.seen = torch.zeros(batch, dtype=torch.int64)
        self.tokens = torch.zeros(batch, HEADS, 0, D + DV)

    def put(self) -> None:
        """One token to each request, now and then padding; then a slot is free, or one more."""
        batch, _, count = self.position.shape
        # As a layer does it: the slot that is free, or else a new one behind the others.
        free = (torch.cat([self.position, torch.full((batch, HEADS, 1), -1)], 2) < 0).int()
        slot = free.argmax(2, keepdim=True)
        if int(slot.max()) == count:
            self.position = torch.cat([self.position, torch.full((batch, HEADS, 1), -1)], 2)
            self.slots.cover(count + 1, 100)
        real = torch.rand(batch, generator=self.random) < 0.9
        token = torch.randn(batch, HEADS, 1, D + DV, generator=self.random)
        at = torch.where(real, self.seen, -1)[:, None, None].expand(-1, HEADS, -1)
        self.slots.put(slot, token[..., :D], token[..., D:], at)
        self.position = self.position.scatter(2, slot, at)
        self.tokens = torch.cat([self.tokens, torch.zeros_like(token)], 2)
        self.tokens = self.tokens.scatter(
            2, self.seen.view(-1, 1, 1, 1).expand_as(token), token * real.view(-1, 1, 1, 1)
        )
        self.seen = self.seen + real

    def evict(self) -> None:
        victim = torch.randint(
            self.position.shape[2], (*self.position.shape[:2], 1), generator=self.random
        )
        self.position = self.position.scatter(2, victim, -1)

    def select(self, rows: torch.Tensor) -> None:
        self.slots.select(rows, self.position.shape[2])
        for name in ("position", "seen", "tokens"):
            setattr(self, name, getattr(self, name).index_select(0, rows))

    def check(self) -> None:
        """Every entry is read exact when it is a sink or new, else as the codec makes it."""
        newest = (self.seen - 1)[:, None, None]
        key, value = self.slots.read(self.position, self.seen)
        exact = (self.position < SINKS) | (self.position > newest - RECENT)
        there = self.position >= 0
        index = self.position.clamp(min=0)[..., None].expand(-1, -1, -1, D + DV)
        tokens = self.tokens.gather(2, index) if index.numel() else index.float()
        parts = tokens[..., :D], tokens[..., D:]
        for got, part, codec in zip(
            (key, value), parts, get_codec(self.codec).alone(), strict=True
        ):
            vectors = Vectors(codec, part.shape[-1])
            wanted = torch.where(exact[..., None], part, vectors.decode(vectors.encode(part)))
            assert torch.equal(got[there], wanted[there])
            assert got.isfinite().all()

    def held(self) -> int:
        both = (self.slots.rows.key, self.slots.rows.value, *self.slots.exact)
        return sum(tensor.untyped_storage().nbytes() for tensor in both)


ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 50)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 10), min_size=1, max_size=4)),
    st.tuples(st.sampled_from(["load", "rewind"]), st.just(0)),
)


@pytest.mark.parametrize("codec", ["int8", "mixed", "kvquant-3"])
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3), seed=st.integers(0, 10**6), actions=st.lists(ACTIONS, max_size=6)
)  # fmt: skip
def test_entries_are_exact_while_new_and_packed_alone_then(codec, batch, seed, actions):
    lanes = Lanes(batch, codec, seed)
    for kind, what in [("put", 45), *actions]:
        if kind == "put":
            for step in range(what):
                lanes.put()
                if step % 3:
                    lanes.evict()
        elif kind == "select":
            rows = torch.tensor([row % len(lanes.seen) for row in what])
            predicted = lanes.slots.nbytes_at(len(rows), lanes.position.shape[2])
            lanes.select(rows)
            assert lanes.slots.nbytes() == predicted
        elif kind == "load":
            tensors = copy.deepcopy(lanes.slots.tensors(lanes.position))
            lanes.slots = new_slots(len(lanes.seen), codec)
            lanes.slots.load(tensors, None)
        else:
            undone, mark = copy.copy(vars(lanes)), lanes.slots.mark()
            lanes.put()
            lanes.slots.rewind(mark)
            vars(lanes).update(undone)
        lanes.check()
        assert lanes.slots.nbytes() == lanes.held()


@pytest.mark.parametrize("codec", list_codecs())
def test_queries_side_by_side_see_what_they_see_one_by_one(codec):
    """`sight` of many queries against `read` at each of them."""
    generator, count = torch.Generator().manual_seed(0), 80
    key, value = (torch.randn(1, HEADS, count, dim, generator=generator) for dim in (D, DV))
    position = torch.arange(count).expand(1, HEADS, count)
    store = new_slots(1, codec)
    sight = store.sight(store.arriving(key, value), position, torch.arange(count)[None, None])
    assert sight.packed is not None
    for newest in (0, 3, 36, 79):
        upto = slice(newest + 1)
        parts = [part[:, :, upto] for part in store.arriving(key, value)]
        at = torch.tensor([newest + 1])
        store.fill(tuple(parts), position[..., upto], at)
        old = sight.packed.old[:, :, 0, newest, upto, None]
        for got, exact, packed in zip(
            store.read(position[..., upto], at), sight[:2], sight.packed[:2], strict=True
        ):
            assert torch.equal(got, torch.where(old, packed[:, :, upto], exact[:, :, upto]))
        assert old.sum() == HEADS * max(newest + 1 - EXACT, 0)


@pytest.mark.parametrize("codec", list_codecs())
def test_packed_slots_are_bytes_and_all_are_counted(codec):
    store = PackedSlots(2, 3, 64, 64, torch.bfloat16, "cpu", get_codec(codec))
    store.cover(500, most=500)
    width = sum(Vectors(part, 64).nbytes for part in get_codec(codec).alone())
    exact = 2 * 3 * EXACT * 256
    assert store.rows.key.dtype == store.rows.value.dtype == torch.uint8
    assert store.nbytes() == 2 * 3 * 500 * width + exact
    assert store.kept_nbytes(10) == 10 * width + exact
    assert store.entry_nbytes() == 256


@pytest.mark.parametrize("module", [packed_slots, slots])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
