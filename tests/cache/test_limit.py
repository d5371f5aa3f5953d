"""A byte limit refuses a step and loses nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig

from cachefold.cache import FoldedCache
from cachefold.cache.limit import held_nbytes
from cachefold.cache.pages import PagePool
from tests.cache import caches
from tests.cache.caches import extend, new_cache
from tests.cache.texts import make_text

TEXT = make_text(0, 200, [0, 3], 0.4)


def state(cache: FoldedCache) -> list:
    """Its bytes belong to it here."""
    return [*caches.state(cache), cache.allocated_nbytes()]


def bytes_after(*bounds: int) -> int:
    """Bytes of a cache that has no spare page."""
    cache = new_cache()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        extend(cache, TEXT, start, stop)
    assert not cache.layers[0].closed.pool.free
    return cache.allocated_nbytes()


def test_the_limit_is_exact():
    needed = bytes_after(0, 60)
    extend(new_cache(needed), TEXT, 0, 60)
    with pytest.raises(ValueError, match=f"max_bytes={needed - 1:,}"):
        extend(new_cache(needed - 1), TEXT, 0, 60)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_refused_step_changes_nothing_in_any_layer(layer):
    """The limit is such that the step fails at `layer`."""
    before = new_cache()
    extend(before, TEXT, 0, 60)
    after = copy.deepcopy(before)
    extend(after, TEXT, 60, 120)
    limit = before.allocated_nbytes() - 1
    for index in range(layer + 1):
        limit += held_nbytes(after.layers[index]) - held_nbytes(before.layers[index])
    cache, free = new_cache(limit), new_cache()
    for each in (cache, free):
        extend(each, TEXT, 0, 60)
    kept = state(cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing was changed"):
            extend(cache, TEXT, 60, 120)
        assert state(cache) == kept
    # A shorter step fits, and the cache is the one that never met a limit.
    for each in (cache, free):
        last = extend(each, TEXT, 60, 62)
    assert state(cache)[:3] == state(free)[:3]
    assert last[0].visible.any()


def test_a_refusal_comes_before_the_pool_grows(monkeypatch):
    cache = new_cache(bytes_after(0, 60))
    extend(cache, TEXT, 0, 60)
    monkeypatch.setattr(PagePool, "reserve", lambda *_: pytest.fail("the pool grew"))
    with pytest.raises(ValueError, match="max_bytes"):
        extend(cache, TEXT, 60, 200)
    with pytest.raises(ValueError, match="max_bytes"):
        cache.batch_repeat_interleave(2)


def test_spare_pages_keep_within_the_limit():
    text = make_text(1, 432, [0, 0], 0.0)
    whole, cache = new_cache(), new_cache()
    extend(whole, text, 0, 432)
    for start, stop in ((0, 400), (400, 432)):
        extend(cache, text, start, stop)
    assert cache.layers[0].closed.pool.free
    cache = new_cache(whole.allocated_nbytes())
    for start, stop in ((0, 400), (400, 432)):
        extend(cache, text, start, stop)
    assert cache.allocated_nbytes() == cache.max_bytes


def test_a_copy_has_a_limit_of_its_own():
    cache = new_cache(bytes_after(0, 60))
    extend(cache, TEXT, 0, 30)
    other = copy.deepcopy(cache)
    extend(other, TEXT, 30, 60)
    with pytest.raises(ValueError, match="max_bytes"):
        extend(other, TEXT, 60, 200)
    assert (cache.get_seq_length(), other.get_seq_length()) == (30, 60)
    extend(cache, TEXT, 30, 60)
    assert state(cache) == state(other)


def test_an_empty_cache_is_empty_again_after_a_refused_prompt():
    cache = new_cache(bytes_after(0, 30))
    with pytest.raises(ValueError, match="max_bytes"):
        extend(cache, TEXT, 0, 200)
    assert cache.get_seq_length() == 0 and cache.allocated_nbytes() == 0
    extend(cache, TEXT, 0, 30)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_a_larger_batch_is_refused_whole_and_a_smaller_one_makes_room(operation):
    cache = new_cache(bytes_after(0, 60) + 10_000)
    extend(cache, TEXT, 0, 60)
    kept, many = state(cache), torch.tensor([0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match="nothing was changed"):
        if operation == "reorder":
            cache.reorder_cache(many)
        elif operation == "repeat":
            cache.batch_repeat_interleave(3)
        else:
            cache.batch_select_indices(many)
    assert state(cache) == kept
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.allocated_nbytes() < 0.6 * kept[-1]


def test_beams_at_the_limit_are_reordered():
    cache = new_cache(bytes_after(0, 60) + 20_000)
    extend(cache, TEXT, 0, 60)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.allocated_nbytes() <= cache.max_bytes


def test_a_file_over_the_limit_is_refused(tmp_path):
    full = new_cache()
    extend(full, TEXT, 0, 120)
    full.save(tmp_path / "a.safetensors")
    cache = new_cache(bytes_after(0, 60))
    extend(cache, TEXT, 0, 30)
    kept = state(cache)
    with pytest.raises(ValueError, match="max_bytes"):
        cache.load(tmp_path / "a.safetensors")
    assert state(cache) == kept
    new_cache(2 * bytes_after(0, 120)).load(tmp_path / "a.safetensors")


def test_options_are_checked():
    with pytest.raises(ValueError, match="max_bytes must be"):
        new_cache(0)
    with pytest.raises(ValueError, match="paged=False"):
        FoldedCache(LlamaConfig(num_hidden_layers=1), [0], paged=False)
