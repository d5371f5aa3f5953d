"""Whole models one token at a time, in place: the same logits as the whole text at once."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from cachefold import DMC, fold
from cachefold.attention import dispatch
from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.models.fold import new_cache
from tests.models.tiny import FAMILIES, random_ids, scramble_decisions, tiny_model

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Grows by one with every step of a layer."""
    counted: list[int] = []
    step = FoldedLayer.step
    monkeypatch.setattr(FoldedLayer, "step", lambda *args: counted.append(1) or step(*args))
    return counted


def folded(family: str = "Llama", delay: int = 3, **changes):
    window = changes.pop("window", None)
    decision = changes.pop("decision", "linear")
    proportional = changes.pop("proportional", False)
    policy = DMC(delay=delay, window=window, decision=decision, proportional=proportional)
    model = fold(tiny_model(family, **changes), policy)
    scramble_decisions(model)
    return model


def feed(model, ids, bounds, cache, mask=None) -> torch.Tensor:
    """Logits of the tokens of `ids` between the bounds, cached."""
    pieces = []
    with torch.no_grad():
        for start, stop in zip(bounds, bounds[1:], strict=False):
            part = None if mask is None else mask[:, :stop]
            out = model(ids[:, start:stop], attention_mask=part, past_key_values=cache)
            pieces.append(out.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("delay", [0, 4, 40])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_steps_equal_extend_and_parallel(family, delay, backend, steps):
    # Half of them weigh entries by their size.
    model, ids = folded(family, delay, proportional=delay == 4), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    # Steps, several tokens at once, steps again.
    bounds = [0, 7, 8, 9, 15, *range(16, 27), 29, 30]
    cache = new_cache(model, backend=backend)
    got = feed(model, ids, bounds, cache, mask)
    folding = len(cache.folded_layers)
    assert len(steps) == folding * sum(b - a == 1 for a, b in zip(bounds, bounds[1:], strict=False))
    real = mask.bool()
    torch.testing.assert_close(got[real], whole[real], **CLOSE)
    # With gradients on, single tokens go the way of many.
    taken, extended = len(steps), new_cache(model)
    for i in range(30):
        model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=extended)
    assert len(steps) == taken
    assert [e.tolist() for e in extended.entries()] == [e.tolist() for e in cache.entries()]
    for a, b in zip(cache.layers, extended.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length() == 30
        if isinstance(a, FoldedLayer):
            assert torch.equal(a.valid_seen, b.valid_seen)
            if b.tail is not None:
                torch.testing.assert_close(a.tail.key, b.tail.key, **CLOSE)


@pytest.mark.parametrize("backend", dispatch.ORDER)
@pytest.mark.parametrize(("dtype", "page_size"), [(torch.float32, 32), (torch.bfloat16, 16)])
@pytest.mark.parametrize("proportional", [False, True])
def test_every_backend_at_a_head_dim_of_real_models(backend, dtype, page_size, proportional):
    ok, reason = dispatch.list_backends()[backend]
    if not ok:
        pytest.skip(reason)
    model = folded(hidden_size=128, head_dim=32, proportional=proportional)
    ids = random_ids(2, 60)
    model, mask = model.to(dtype), torch.ones_like(ids)
    mask[0, :23] = 0
    cache = new_cache(model, page_size=page_size, backend=backend)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    got = feed(model, ids, [0, 20, *range(21, 61)], cache, mask)[mask.bool()]
    if dtype == torch.float32:
        torch.testing.assert_close(got, whole, **CLOSE)
        return
    # Rounding may turn a decision, so that only the mean is near.
    assert (got - whole).abs().float().mean() < 0.05 * whole.abs().float().mean()


def test_the_neuron_that_decides_leaves_attention_in_steps_too(steps):
    model, ids = folded(decision="neuron", delay=2), random_ids(2, 24)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 100  # 5 is far for a tiny model
    whole = model(ids, use_cache=False).logits
    cache = new_cache(model)
    torch.testing.assert_close(feed(model, ids, [0, *range(9, 25)], cache), whole, **CLOSE)
    assert steps and cache.compression_ratio() > 1.05


@pytest.mark.parametrize("proportional", [False, True])
def test_steps_go_on_in_copies_and_files(tmp_path, steps, proportional):
    model, ids = folded(proportional=proportional), random_ids(2, 30)
    whole = model(ids, use_cache=False).logits
    cache = new_cache(model)
    feed(model, ids, [0, 9, *range(10, 18)], cache)
    cache.save(tmp_path / "a.safetensors")
    others = [copy.deepcopy(cache), new_cache(model).load(tmp_path / "a.safetensors"), cache]
    for each in others:
        got = feed(model, ids, list(range(17, 31)), each)
        torch.testing.assert_close(got, whole[:, 17:], **CLOSE)
    assert len(steps) == 2 * (8 + 3 * 13)


def test_beams_and_smaller_batches_between_steps():
    model, ids = folded(), random_ids(3, 40)
    cache = new_cache(model)
    feed(model, ids, [0, 9, *range(10, 20)], cache)
    for index in ([2, 2, 0], [1, 0, 2], [1, 1]):
        if len(index) == 3:
            cache.reorder_cache(torch.tensor(index))
        else:
            cache.batch_select_indices(torch.tensor(index))
        ids = ids[index]
        seen = cache.get_seq_length()
        whole = model(ids, use_cache=False).logits
        got = feed(model, ids, list(range(seen, seen + 6)), cache)
        torch.testing.assert_close(got, whole[:, seen : seen + 5], **CLOSE)
    cache.reset()
    got = feed(model, ids, [0, 5, *range(6, 20)], cache)
    torch.testing.assert_close(got, whole[:, :19], **CLOSE)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_steps_refused_by_the_byte_limit_are_as_if_never_taken(family):
    model, ids = folded(family), random_ids(2, 120)
    whole = model(ids, use_cache=False).logits
    cache = new_cache(model, max_bytes=10**9)
    feed(model, ids, [0, 20, *range(21, 31)], cache)
    cache._limit.max_bytes = cache.allocated_nbytes() + 2500
    seen = cache.get_seq_length()
    with pytest.raises(ValueError, match="nothing was changed"):
        for seen in range(30, 120):
            feed(model, ids, [seen, seen + 1], cache)
    held = cache.allocated_nbytes()
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing was changed"):
            feed(model, ids, [seen, seen + 1], cache)
        assert cache.get_seq_length() == seen > 30 and cache.allocated_nbytes() == held
    cache._limit.max_bytes = 10**9
    got = feed(model, ids, list(range(seen, 121)), cache)
    torch.testing.assert_close(got, whole[:, seen:], **CLOSE)


def test_a_reserved_cache_steps_without_moving():
    model, ids = folded(delay=0), random_ids(2, 60)
    cache = new_cache(model)
    feed(model, ids, [0, 10], cache)
    cache.reserve(50)
    pools = [layer.closed.pool.data for layer in cache.layers]
    whole = model(ids, use_cache=False).logits
    got = feed(model, ids, list(range(10, 61)), cache)
    torch.testing.assert_close(got, whole[:, 10:], **CLOSE)
    assert all(a is layer.closed.pool.data for a, layer in zip(pools, cache.layers, strict=True))


def test_a_window_says_why_it_takes_no_steps(steps, caplog):
    dispatch.tell.cache_clear()
    model, ids = folded(window=3), random_ids(1, 14)
    with caplog.at_level(logging.INFO):
        feed(model, ids, [0, *range(9, 15)], new_cache(model))
    assert not steps
    assert caplog.text.count("a window needs the tokens of the open entry") == 1


def test_the_backend_is_chosen_by_name():
    model = folded()
    with pytest.raises(ValueError, match="Did you mean 'numba'"):
        new_cache(model, backend="nunba")
    # A cache made by hand is checked when it is used.
    cache = FoldedCache(model.config, [0, 1], delay=3, backend="referense")
    with pytest.raises(ValueError, match="Did you mean 'reference'"):
        feed(model, random_ids(1, 8), [0, 8], cache)
    # 8 channels are not enough for its vectors.
    with pytest.raises(ValueError, match="backend 'numba' can't compute prefill here: .*8"):
        feed(model, random_ids(1, 8), [0, 8], new_cache(model, backend="numba"))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_whatever_stands_at_padding_does_not_reach_later_steps(backend):
    """A gap comes token by token; its embedding is NaN."""
    model, ids = folded(delay=2), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 12:16] = 0
    ids[0, 12:16] = 0
    logits = []
    for embedding in (0.5, torch.nan):
        model.model.embed_tokens.weight.data[0] = embedding
        cache = new_cache(model, backend=backend)
        logits.append(feed(model, ids, [0, 10, *range(11, 31)], cache, mask))
    real = mask.bool()
    assert logits[1][real].isfinite().all() and logits[1][0, 12].isnan().any()
    assert torch.equal(logits[0][real], logits[1][real])


@pytest.mark.parametrize(
    ("count", "options"), [(9, {}), (9, {"backend": "reference"}), (30, {"codec": "int4"})]
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_short_prompt_in_inference_mode_goes_on_outside_of_it(count, options, repeats):
    """Nothing is in pages yet: what comes after the prompt writes to them in place."""
    model, ids = folded(delay=16), random_ids(1, 80)
    cache = new_cache(model, **options)
    with torch.inference_mode():
        model(ids[:, :count], past_key_values=cache)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    rows = ids.expand(repeats, -1)
    got = feed(model, rows[:, count:], range(81 - count), cache)
    want = feed(model, rows, [0, *range(count, 81)], new_cache(model, **options))
    torch.testing.assert_close(got, want[:, count:], **CLOSE)


@pytest.mark.parametrize("delay", [0, 4])
def test_weights_of_sizes_get_finite_gradients_with_a_cache(delay):
    """Where no entry is open yet as well. Entries in pages carry none, so that they are others."""
    model, ids = folded(delay=delay, proportional=True), random_ids(2, 30)
    found = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        layers = [layer.self_attn for layer in model.model.layers]
        found.append([layer.decision.growth.grad.clone() for layer in layers])
    for cached, whole in zip(*found, strict=True):
        assert whole.abs().max() > 0
        assert cached.isfinite().all()


def test_a_file_of_another_policy_is_refused(tmp_path):
    caches = []
    for proportional in (True, False):
        model, ids = folded(proportional=proportional), random_ids(2, 30)
        caches.append(new_cache(model))
        feed(model, ids, [0, 30], caches[-1])
    caches[0].save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="saved with proportional=True"):
        caches[1].load(tmp_path / "a.safetensors")
