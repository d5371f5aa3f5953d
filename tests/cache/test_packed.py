"""Packed pages: what is exact, what is packed, every byte counted, nothing lost on the way."""

from __future__ import annotations

import copy
import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from cachefold.cache import FoldedCache, FoldedLayer, packed, packed_entries
from cachefold.cache.codecs import PAGE, get_codec, list_codecs
from cachefold.cache.packed import SINKS, Shape, packed_count
from cachefold.cache.packed_entries import PackedEntries
from cachefold.core.pages import gather, slots
from cachefold.core.tokens import Tokens
from tests.cache.texts import DIM, HEADS, Text, make_text

D, DV = 5, 7


def new_entries(batch: int, codec: str = "int8", page_size: int = 16) -> PackedEntries:
    shape = Shape(batch, HEADS, page_size, D, DV, torch.float32)
    return PackedEntries(shape, get_codec(codec), "cpu")


def poison(entries: PackedEntries) -> None:
    """Garbage into every place that holds no entry."""
    held = entries.lengths - entries.lists.lengths
    empty = torch.arange(entries.exact["key"].shape[2]) >= held[..., None]
    for part in entries.exact.values():
        part[empty] = math.nan
    free = sorted(set(range(entries.lists.pool.num_pages))
                  - set(entries.lists.table[entries.lists.table >= 0].tolist()))  # fmt: skip
    entries.lists.pool.data[free] = 255


def rows_of(entries: PackedEntries, read: tuple[torch.Tensor, torch.Tensor]) -> list:
    """[request][head] -> (S, D + Dv) as attention reads it."""
    pages, table = read
    key, value = gather(pages, entries.page_size, D, table)
    there = slots(entries.lengths, table.shape[2], entries.page_size)
    both = torch.cat([key, value], -1)
    return [[both[b, k][there[b, k]] for k in range(HEADS)] for b in range(len(both))]


def check_invariants(entries: PackedEntries) -> None:
    """Full pages are packed, no page is lost, and bytes are what the tensors take."""
    lists = entries.lists
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


APPEND = st.tuples(st.just("append"), st.integers(1, 90), st.integers(0, 10**6))
SELECT = st.tuples(st.just("select"), st.lists(st.integers(0, 10), max_size=4), st.just(0))
LOAD = st.tuples(st.just("load"), st.just(0), st.just(0))


@pytest.mark.parametrize("codec", ["int8", "mixed", "kvquant-3"])
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), page_size=st.sampled_from([16, 32]),
    actions=st.lists(st.one_of(APPEND, APPEND, SELECT, LOAD), max_size=8),
)  # fmt: skip
def test_entries_are_exact_when_new_then_packed(codec, batch, page_size, actions):
    entries = new_entries(batch, codec, page_size)
    wanted = [[torch.zeros(0, D + DV) for _ in range(HEADS)] for _ in range(batch)]
    weights = [[torch.zeros(0) for _ in range(HEADS)] for _ in range(batch)]
    for kind, what, seed in actions:
        poison(entries)
        if kind == "select":
            rows = [row % len(wanted) for row in what] if wanted else []
            predicted = entries.nbytes_at(torch.tensor(rows, dtype=torch.int64))
            entries.select(torch.tensor(rows, dtype=torch.int64))
            wanted, weights = ([list(part[row]) for row in rows] for part in (wanted, weights))
            assert entries.nbytes() == predicted
        elif kind == "load":
            tensors = entries.tensors()
            entries = new_entries(len(wanted), codec, page_size)
            entries.load(copy.deepcopy(tensors))
        else:
            generator = torch.Generator().manual_seed(seed)
            new = torch.rand(len(wanted), HEADS, what, generator=generator) < 0.6
            vectors = torch.randn(int(new.sum()), D + DV, generator=generator)
            mass = torch.rand(len(vectors), generator=generator)
            predicted = entries.nbytes_with(entries.lengths + new.sum(-1))
            read = entries.append(new, vectors[:, :D], vectors[:, D:], 0, mass)
            assert entries.nbytes() == predicted
            for (b, k, _), vector, weight in zip(
                new.nonzero().tolist(), vectors, mass, strict=True
            ):
                wanted[b][k] = torch.cat([wanted[b][k], vector[None]])
                weights[b][k] = torch.cat([weights[b][k], weight[None]])
            # In the call that brought them the new entries are exact; then full pages are packed.
            got = rows_of(entries, read)
            assert all(torch.equal(got[b][k], wanted[b][k])
                       for b in range(len(wanted)) for k in range(HEADS))  # fmt: skip
            for b in range(len(wanted)):
                for k in range(HEADS):
                    old = len(wanted[b][k]) - int(new[b, k].sum())
                    wanted[b][k] = packed_again(wanted[b][k], weights[b][k], codec, old)
        check_invariants(entries)
        poison(entries)
        got = rows_of(entries, entries.read())
        for b in range(len(wanted)):
            for k in range(HEADS):
                torch.testing.assert_close(got[b][k], wanted[b][k], rtol=0, atol=0)


def packed_again(rows: torch.Tensor, weights: torch.Tensor, codec: str, old: int) -> torch.Tensor:
    """Rows with the pages that became full since there were `old` rows as the codec makes them."""
    first, last = (int(packed_count(torch.tensor(n))) for n in (old, len(rows)))
    rows = rows.clone()
    for start in range(SINKS + first, SINKS + last, PAGE):
        page, coder = rows[None, start : start + PAGE], get_codec(codec)
        codes = coder.encode(page[..., :D], page[..., D:], weights[None, start : start + PAGE])
        rows[start : start + PAGE] = torch.cat(coder.decode(codes, D, DV), -1)[0]
    return rows


def layer_of(codec: str | None, delay: int = 4, page_size: int = 16) -> FoldedLayer:
    return FoldedLayer(delay, None, page_size, None, None if codec is None else get_codec(codec))


def seen_by_last(layer: FoldedLayer, stream, b: int, k: int) -> torch.Tensor:
    """(S, 2 DIM) entries in pages that the last new token sees."""
    key, value = gather(stream.pages, layer.page_size, DIM, stream.table)
    count = int(stream.visible[b, k, -1])
    return torch.cat([key[b, k, :count], value[b, k, :count]], -1)


@pytest.mark.parametrize("codec", list_codecs())
@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_layer_folds_the_same_entries_and_packs_the_old_ones(codec, size):
    """Chunks of any size, requests of unequal length, heads that merge differently."""
    text = make_text(3, 150, [0, 9], 0.3)
    plain, layer = layer_of(None), layer_of(codec)
    for start in range(0, 150, size):
        part = text.part(start, min(start + size, 150))
        if layer.closed is not None:
            poison(layer.closed)
        old = 0 if layer.closed is None else layer.closed.lists.lengths.clone()
        streams = [each.extend(Tokens(*part)) for each in (plain, layer)]
        assert torch.equal(streams[0].visible, streams[1].visible)
        assert torch.equal(plain.entries(), layer.entries())
        for b in range(2):
            for k in range(HEADS):
                want, got = (seen_by_last(*pair, b, k)
                             for pair in zip((plain, layer), streams, strict=True))  # fmt: skip
                behind = SINKS + (int(old[b, k]) if torch.is_tensor(old) else 0)
                # Sinks and what is not packed yet are the exact ones, in the dtype of the cache.
                assert torch.equal(got[:SINKS], want[:SINKS])
                assert torch.equal(got[behind:], want[behind:])
                wrong = (got - want)[SINKS:behind].abs()
                assert wrong.numel() == 0 or 0 < wrong.max() < 3
    assert int(layer.closed.lists.lengths.min()) >= 2 * PAGE
    assert layer.can_step is False and plain.can_step is True


def test_mass_of_an_entry_is_its_summed_weight():
    text = make_text(1, 40, [0], 1.0)
    text.alpha[:, :, 20:] = 0
    layer = layer_of("mixed", delay=0)
    feed_packed(layer, text, 0, 40)
    mass = layer.closed.exact["mass"]
    torch.testing.assert_close(mass[0, :, 0].double(), text.omega[0, :, :20].sum(-1))
    torch.testing.assert_close(mass[0, :, 1:19].double(), text.omega[0, :, 20:38])


def feed_packed(layer: FoldedLayer, text: Text, start: int, stop: int) -> None:
    layer.extend(Tokens(*text.part(start, stop)))


def new_cache(max_bytes: int | None = None, codec: str | None = "int4", delay: int = 4):
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=24, num_attention_heads=4, num_key_value_heads=HEADS
    )
    return FoldedCache(config, [0, 2], delay=delay, max_bytes=max_bytes, codec=codec)


def fill(cache: FoldedCache, text: Text, start: int, stop: int) -> None:
    part = text.part(start, stop)
    cache.layers[0].extend(Tokens(*part))
    cache.update(part[0], part[1], 1)
    cache.layers[2].extend(Tokens(*part))


def state(cache: FoldedCache) -> list:
    folded = [layer.tensors() for layer in (cache.layers[0], cache.layers[2])]
    listed = [{name: tensor.tolist() for name, tensor in parts.items()} for parts in folded]
    return [listed, cache.layers[1].keys.tolist(), cache.get_seq_length()]


TEXT = make_text(0, 300, [0, 3], 0.2)


@pytest.mark.parametrize("codec", ["int4", "mixed"])
def test_bytes_are_counted_exactly(codec):
    cache = new_cache(codec=codec)
    fill(cache, TEXT, 0, 200)
    layer = cache.layers[0]
    closed, runs = layer.closed, [layer.tail, layer.ring]
    held = [closed.lists.pool.data, closed.lists.table, closed.lists.lengths, closed.lengths]
    held += [*closed.exact.values(), layer.valid_seen]
    held += [tensor for run in runs for tensor in run.tensors()]
    assert layer.nbytes() == sum(tensor.untyped_storage().nbytes() for tensor in held)
    pages = int(closed.lists.lengths.sum()) // PAGE
    exact = int((closed.lengths - closed.lists.lengths).sum())
    entry = 2 * DIM * 8
    beside = 4 if codec == "mixed" else 0
    ring = 2 * HEADS * 4 * entry
    tail = 2 * HEADS * (entry + 8)
    packed_bytes = pages * get_codec(codec).page_nbytes(DIM, DIM)
    assert layer.kept_nbytes() == packed_bytes + exact * (entry + beside) + ring + tail
    dense = new_cache(codec=None)
    fill(dense, TEXT, 0, 200)
    assert cache.dense_nbytes() == dense.dense_nbytes()
    assert cache.compression_ratio() == dense.compression_ratio()
    assert cache.layers[0].nbytes() < 0.6 * dense.layers[0].nbytes()


def test_reset_frees_all():
    cache = new_cache()
    fill(cache, TEXT, 0, 200)
    cache.reset()
    assert cache.nbytes() == 0 and cache.layers[0].nbytes() == 0
    fill(cache, TEXT, 0, 50)
    fresh = new_cache()
    fill(fresh, TEXT, 0, 50)
    assert state(cache) == state(fresh)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_refused_step_changes_nothing(layer):
    before = new_cache()
    for start in range(0, 200, 50):
        fill(before, TEXT, start, start + 50)
    after = copy.deepcopy(before)
    fill(after, TEXT, 200, 280)
    grown = [after.layers[i].nbytes() - before.layers[i].nbytes() for i in (0, 2)]
    assert all(more > 0 for more in grown)
    dense = sum(
        t.untyped_storage().nbytes() for t in (after.layers[1].keys, after.layers[1].values)
    )
    dense -= sum(
        t.untyped_storage().nbytes() for t in (before.layers[1].keys, before.layers[1].values)
    )
    limit = before.allocated_nbytes() + grown[0] - 1 + (dense + grown[1] if layer else 0)
    cache, free = new_cache(limit), new_cache()
    for each in (cache, free):
        for start in range(0, 200, 50):
            fill(each, TEXT, start, start + 50)
    kept = state(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing was changed"):
            fill(cache, TEXT, 200, 280)
        assert state(cache) == kept and cache.allocated_nbytes() == before.allocated_nbytes()
    for each in (cache, free):
        each._limit = None
        fill(each, TEXT, 200, 201)
    assert state(cache) == state(free)


def test_beams_are_copies():
    cache, other = new_cache(), new_cache()
    fill(cache, TEXT, 0, 200)
    rows = [1, 1, 0]
    fill(other, Text(*(x[rows] for x in vars(TEXT).values())), 0, 200)
    cache.reorder_cache(torch.tensor(rows))
    assert state(cache) == state(other)
    fill(cache, Text(*(x[rows] for x in vars(TEXT).values())), 200, 260)
    fill(other, Text(*(x[rows] for x in vars(TEXT).values())), 200, 260)
    assert state(cache) == state(other)


@pytest.mark.parametrize("codec", ["int4", "mixed"])
def test_save_and_load(tmp_path, codec):
    cache = new_cache(codec=codec)
    fill(cache, TEXT, 0, 200)
    cache.save(tmp_path / "a.safetensors")
    other = new_cache(codec=codec).load(tmp_path / "a.safetensors")
    assert other.allocated_nbytes() <= cache.allocated_nbytes()
    assert other.nbytes() == cache.nbytes()
    for each in (cache, other):
        fill(each, TEXT, 200, 300)
    assert state(cache) == state(other)
    with pytest.raises(ValueError, match=f"codec='{codec}', but this cache has codec='int2'"):
        new_cache(codec="int2").load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codec=None"):
        new_cache(codec=None).load(tmp_path / "a.safetensors")


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    cache = new_cache()
    fill(cache, TEXT, 0, 200)
    good = cache.layers[0].tensors()
    short = good | {"packed": good["packed"][:, :, :1]}
    monkeypatch.setattr(cache.layers[0], "tensors", lambda: short)
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="packed pages are missing"):
        new_cache().load(tmp_path / "a.safetensors")
    narrow = good | {"packed": good["packed"][..., :-1]}
    monkeypatch.setattr(cache.layers[0], "tensors", lambda: narrow)
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codec int4 makes"):
        new_cache().load(tmp_path / "a.safetensors")


def test_no_pages_can_be_reserved():
    cache = new_cache()
    fill(cache, TEXT, 0, 20)
    with pytest.raises(ValueError, match="without a codec"):
        cache.reserve(10)


def test_unknown_codecs_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'int4'"):
        new_cache(codec="int44")


def test_gradients_and_inference_mode_meet():
    cache = new_cache()
    with torch.inference_mode():
        fill(cache, TEXT, 0, 100)
    fill(cache, TEXT, 100, 200)
    with torch.inference_mode():
        fill(cache, TEXT, 200, 300)
    other = new_cache()
    for start in range(0, 300, 100):
        fill(other, TEXT, start, start + 100)
    assert state(cache) == state(other)


def test_offload_and_prefetch_keep_all():
    cache = new_cache()
    fill(cache, TEXT, 0, 200)
    kept = state(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert state(cache) == kept


@pytest.mark.parametrize("module", [packed, packed_entries])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
