"""Steps of one token in place: padding, the byte limit, reserved pages, files in the middle."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.cache.entries import PagedEntries
from cachefold.core.tokens import Tokens
from tests.cache.caches import extend, new_cache, state
from tests.cache.texts import HEADS, Text, expected_step, feed, make_text, run_step


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("delay", [0, 1, 4, 16])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.integers(1, 9),
    steps=st.integers(1, 30),
    padding=st.lists(st.integers(0, 12), min_size=1, max_size=2),
    gap=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_steps_with_padding_equal_recurrence(
    delay, window, seed, prompt, steps, padding, gap, rate
):
    """Padding on the left may last into the steps, and in the last request there is a gap."""
    text = make_text(seed, prompt + steps, padding, rate)
    text.valid[-1, min(gap) : max(gap)] = False
    layer = FoldedLayer(delay, window)
    feed(layer, text, [0, prompt])
    for i in range(prompt, prompt + steps):
        got = run_step(layer, text, i)
        for b in range(len(padding)):
            for k in range(HEADS) if text.valid[b, i] else ():
                want = expected_step(text, b, k, i, delay, window)
                torch.testing.assert_close(got[b, k], want, rtol=1e-9, atol=1e-9)
    assert layer.seen == prompt + steps
    assert torch.equal(layer.valid_seen, text.valid.sum(1))


def test_a_step_after_a_step_changes_tensors_in_place_and_looks_ahead_once_in_eight(monkeypatch):
    text, layer, looks = make_text(0, 60, [0, 3], 0.5), FoldedLayer(16), []
    feed(layer, text, [0, 40])
    cover = PagedEntries.cover
    monkeypatch.setattr(PagedEntries, "cover", lambda *args: looks.append(1) or cover(*args))
    run_step(layer, text, 40)
    held = [*layer.ring.tensors(), *layer.tail.tensors(), layer.turn, layer.closed.lengths]
    kept = [layer.valid_seen, *held]
    for i in range(41, 57):
        run_step(layer, text, i)
    now = [*layer.ring.tensors(), *layer.tail.tensors(), layer.turn, layer.closed.lengths]
    assert all(a is b for a, b in zip(kept, [layer.valid_seen, *now], strict=True))
    assert len(looks) == 3


@pytest.mark.parametrize("first", [True, False])
def test_a_prompt_in_inference_mode_and_steps_outside_of_it(first):
    text, layer = make_text(0, 60, [0, 3], 0.2), FoldedLayer(2)
    with torch.inference_mode(first):
        feed(layer, text, [0, 20])
        run_step(layer, text, 20)
        layer.reorder_cache(torch.tensor([0, 1]))
    with torch.inference_mode(not first):
        for i in range(21, 60):
            got = run_step(layer, text, i)
    torch.testing.assert_close(got[1, 1], expected_step(text, 1, 1, 59, 2))


def step(cache: FoldedCache, text: Text, i: int) -> torch.Tensor:
    part = text.part(i, i + 1)
    run_step(cache.layers[0], text, i)
    cache.update(part[0], part[1], 1)
    return run_step(cache.layers[2], text, i)


@pytest.mark.parametrize("delay", [0, 4])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_refused_step_changes_nothing_in_any_layer(failing, delay, monkeypatch):
    """With just so many bytes that the step fails at layer `failing`, then with more."""
    text = make_text(0, 120, [0, 3], 0.2)
    cache, free = new_cache(10**9, delay), new_cache(None, delay)
    for each in (cache, free):
        extend(each, text, 0, 50)
        for i in range(50, 60):
            step(each, text, i)
    held = cache.allocated_nbytes()
    for i in range(60, 110):
        kept, place = state(cache), i
        before = [layer_bytes(cache, n) for n in range(3)]
        other = copy.deepcopy(cache)
        step(other, text, i)
        grown = [layer_bytes(other, n) - before[n] for n in range(3)]
        if grown[failing]:
            break
        step(cache, text, i)
        step(free, text, i)
    else:
        pytest.fail("no step that grows this layer")
    held = cache.allocated_nbytes()
    cache._limit.max_bytes = held + sum(grown[: failing + 1]) - 1
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing was changed"):
            step(cache, text, place)
        assert state(cache) == kept and cache.allocated_nbytes() == held
    cache._limit.max_bytes = 10**9
    for i in range(place, 120):
        torch.testing.assert_close(step(cache, text, i), step(free, text, i))
    assert state(cache) == state(free)


def layer_bytes(cache: FoldedCache, index: int) -> int:
    from cachefold.cache.limit import held_nbytes

    return held_nbytes(cache.layers[index])


def test_a_step_that_fails_in_a_later_layer_is_undone_in_the_earlier_ones():
    text = make_text(0, 60, [0, 3], 0.5)
    cache = new_cache(10**9)
    extend(cache, text, 0, 50)
    step(cache, text, 50)
    kept = state(cache)
    run_step(cache.layers[0], text, 51)
    assert state(cache) != kept
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.layers[2].step(Tokens(*text.part(51, 52)), out_of_memory)
    assert state(cache) == kept
    torch.testing.assert_close(step(cache, text, 51)[0, 0], expected_step(text, 0, 0, 51, 4))


def out_of_memory(layer: FoldedLayer) -> torch.Tensor:
    layer.ring.key.fill_(7.0)
    layer.turn.add_(1)
    layer.closed.lengths.add_(1)
    raise RuntimeError("out of memory")


def test_save_and_load_between_steps(tmp_path):
    text = make_text(0, 60, [0, 3], 0.5)
    cache = new_cache()
    extend(cache, text, 0, 5)
    for i in range(5, 23):
        step(cache, text, i)
    cache.save(tmp_path / "a.safetensors")
    other = new_cache().load(tmp_path / "a.safetensors")
    twin = copy.deepcopy(cache)
    for i in range(23, 60):
        got = [step(each, text, i) for each in (cache, other, twin)]
        assert torch.equal(got[0], got[2])
        torch.testing.assert_close(got[0], got[1])  # its ring began anew, so sums are reordered
    assert state(cache) == state(other) == state(twin)


@pytest.mark.parametrize("delay", [0, 4])
def test_reserved_pages_keep_every_address(delay):
    text = make_text(0, 120, [0, 3], 0.0)
    cache = new_cache(None, delay)
    extend(cache, text, 0, 20)
    cache.reserve(100)
    layer = cache.layers[0]
    kept = [layer.closed.pool.data, layer.closed.table, layer.closed.lengths, layer.turn]
    kept += [*layer.ring.tensors(), *layer.tail.tensors()]
    for i in range(20, 120):
        got = step(cache, text, i)
    now = [layer.closed.pool.data, layer.closed.table, layer.closed.lengths, layer.turn]
    now += [*layer.ring.tensors(), *layer.tail.tensors()]
    assert all(a is b for a, b in zip(kept, now, strict=True))
    torch.testing.assert_close(got[1, 0], expected_step(text, 1, 0, 119, delay))


def test_reserve_is_refused_whole():
    text = make_text(0, 60, [0, 3], 0.0)
    cache = new_cache(10**9)
    with pytest.raises(ValueError, match="feed the prompt"):
        cache.reserve(5)
    extend(cache, text, 0, 20)
    with pytest.raises(ValueError, match="must be >= 1"):
        cache.reserve(0)
    kept, held = state(cache), cache.allocated_nbytes()
    cache._limit.max_bytes = held + 3 * HEADS * 2 * cache.layers[0].closed.pool.page_nbytes
    with pytest.raises(ValueError, match="nothing was changed"):
        cache.reserve(1000)
    assert state(cache) == kept and cache.allocated_nbytes() == held
    cache._limit.max_bytes = 10**9
    cache.reserve(16)
    assert cache.allocated_nbytes() > held
    step(cache, text, 20)


def test_a_window_takes_no_steps():
    layer = FoldedLayer(4, 3)
    text = make_text(0, 12, [0], 0.5)
    assert not layer.can_step
    feed(layer, text, [0, 12])
    assert not layer.can_step
    layer.reserve(40)
    assert layer.ahead == 0 and layer.turn is None
    feed(layer, make_text(1, 40, [0], 0.0), [0, 40])
