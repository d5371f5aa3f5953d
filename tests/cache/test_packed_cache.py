"""Layers and caches with packed pages: the same entries, every byte counted, nothing lost."""

from __future__ import annotations

import copy

import pytest
import torch

from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.cache.codecs import PAGE, get_codec, list_codecs
from cachefold.cache.packed import SINKS
from cachefold.core.pages import gather
from cachefold.core.tokens import Tokens
from tests.cache import caches
from tests.cache.caches import extend, state
from tests.cache.texts import DIM, HEADS, Text, make_text, poison_packed

TEXT = make_text(0, 300, [0, 3], 0.2)


def new_cache(max_bytes: int | None = None, codec: str | None = "int4") -> FoldedCache:
    return caches.new_cache(max_bytes, codec=codec)


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
            poison_packed(layer.closed)
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
    layer.extend(Tokens(*text.part(0, 40)))
    mass = layer.closed.exact["mass"]
    torch.testing.assert_close(mass[0, :, 0].double(), text.omega[0, :, :20].sum(-1))
    torch.testing.assert_close(mass[0, :, 1:19].double(), text.omega[0, :, 20:38])


@pytest.mark.parametrize("codec", ["int4", "mixed"])
def test_bytes_are_counted_exactly(codec):
    cache = new_cache(codec=codec)
    extend(cache, TEXT, 0, 200)
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
    extend(dense, TEXT, 0, 200)
    assert cache.dense_nbytes() == dense.dense_nbytes()
    assert cache.compression_ratio() == dense.compression_ratio()
    assert cache.layers[0].nbytes() < 0.6 * dense.layers[0].nbytes()


def test_reset_frees_all():
    cache = new_cache()
    extend(cache, TEXT, 0, 200)
    cache.reset()
    assert cache.nbytes() == 0 and cache.layers[0].nbytes() == 0
    extend(cache, TEXT, 0, 50)
    fresh = new_cache()
    extend(fresh, TEXT, 0, 50)
    assert state(cache) == state(fresh)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_refused_step_changes_nothing(layer):
    before = new_cache()
    for start in range(0, 200, 50):
        extend(before, TEXT, start, start + 50)
    after = copy.deepcopy(before)
    extend(after, TEXT, 200, 280)
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
            extend(each, TEXT, start, start + 50)
    kept = state(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing was changed"):
            extend(cache, TEXT, 200, 280)
        assert state(cache) == kept and cache.allocated_nbytes() == before.allocated_nbytes()
    for each in (cache, free):
        each._limit = None
        extend(each, TEXT, 200, 201)
    assert state(cache) == state(free)


def test_beams_are_copies():
    cache, other = new_cache(), new_cache()
    extend(cache, TEXT, 0, 200)
    rows = [1, 1, 0]
    extend(other, Text(*(x[rows] for x in vars(TEXT).values())), 0, 200)
    cache.reorder_cache(torch.tensor(rows))
    assert state(cache) == state(other)
    extend(cache, Text(*(x[rows] for x in vars(TEXT).values())), 200, 260)
    extend(other, Text(*(x[rows] for x in vars(TEXT).values())), 200, 260)
    assert state(cache) == state(other)


@pytest.mark.parametrize("codec", ["int4", "mixed"])
def test_save_and_load(tmp_path, codec):
    cache = new_cache(codec=codec)
    extend(cache, TEXT, 0, 200)
    cache.save(tmp_path / "a.safetensors")
    other = new_cache(codec=codec).load(tmp_path / "a.safetensors")
    assert other.allocated_nbytes() <= cache.allocated_nbytes()
    assert other.nbytes() == cache.nbytes()
    for each in (cache, other):
        extend(each, TEXT, 200, 300)
    assert state(cache) == state(other)
    with pytest.raises(ValueError, match=f"codec='{codec}', but this cache has codec='int2'"):
        new_cache(codec="int2").load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="codec=None"):
        new_cache(codec=None).load(tmp_path / "a.safetensors")


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    cache = new_cache()
    extend(cache, TEXT, 0, 200)
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
    extend(cache, TEXT, 0, 20)
    with pytest.raises(ValueError, match="without a codec"):
        cache.reserve(10)


def test_unknown_codecs_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'int4'"):
        new_cache(codec="int44")


def test_gradients_and_inference_mode_meet():
    cache = new_cache()
    with torch.inference_mode():
        extend(cache, TEXT, 0, 100)
    extend(cache, TEXT, 100, 200)
    with torch.inference_mode():
        extend(cache, TEXT, 200, 300)
    other = new_cache()
    for start in range(0, 300, 100):
        extend(other, TEXT, start, start + 100)
    assert state(cache) == state(other)


def test_offload_and_prefetch_keep_all():
    cache = new_cache()
    extend(cache, TEXT, 0, 200)
    kept = state(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert state(cache) == kept
