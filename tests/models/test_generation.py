"""generate() makes a FoldedCache, takes no other, and the class is as before after unfold."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from cachefold import DMC, TOVA, FoldedCache, fold, unfold
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def _folded():
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    return model


def test_generate_makes_a_folded_cache_unless_told_to_use_none():
    model, ids = _folded(), random_ids(1, 9)
    cached = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    assert isinstance(cached.past_key_values, FoldedCache)
    plain = model.generate(ids, use_cache=False, return_dict_in_generate=True, **OPTIONS)
    assert plain.past_key_values is None
    assert torch.equal(plain.sequences, cached.sequences)


def _dialled():
    model = fold(tiny_model(), DMC(cr=2, max_cr=8, delay=2))
    scramble_decisions(model)
    return model


@pytest.mark.parametrize("options", [{"cr": 4.0}, {"preset": "bulk"}])
def test_a_ratio_without_a_cache_to_keep_it_is_refused(options):
    model, ids = _dialled(), random_ids(1, 9)
    with pytest.raises(ValueError, match=r"cr and preset of generate\(\)"):
        model.generate(ids, use_cache=False, **options, **OPTIONS)
    model.generation_config.use_cache = False
    with pytest.raises(ValueError, match="generation_config.use_cache = True"):
        model.generate(ids, **options, **OPTIONS)
    assert model.generate(ids, use_cache=True, **options, **OPTIONS).shape == (1, 13)


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=6)])
def test_a_cache_that_is_not_to_be_used_is_refused(policy):
    model, ids = fold(tiny_model(), policy), random_ids(1, 9)
    cache = new_cache(model)
    for call, options in ((model, {}), (model.generate, OPTIONS)):
        with pytest.raises(ValueError, match="use_cache=False goes with no FoldedCache"):
            call(ids, use_cache=False, past_key_values=cache, **options)
    assert cache.get_seq_length() == 0


def test_beams_from_a_short_prompt_in_inference_mode():
    """transformers reorders the cache outside of it, before an entry is in pages."""
    model, ids = fold(tiny_model(), DMC()), random_ids(1, 9)
    want = model.generate(ids, num_beams=3, **OPTIONS)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, num_beams=3, **OPTIONS), want)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' asks for another"),
        ({"past_key_values": DynamicCache()}, "needs a FoldedCache, got DynamicCache"),
    ],
)
def test_other_caches_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        _folded().generate(random_ids(1, 9), **options, **OPTIONS)


def test_a_cache_implementation_of_the_model_is_refused_too():
    model = _folded()
    model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match="generation_config.cache_implementation = None"):
        model.generate(random_ids(1, 9), **OPTIONS)


def test_the_class_changes_and_comes_back():
    model = _folded()
    assert type(model).__name__ == "FoldedLlamaForCausalLM"
    assert isinstance(model, LlamaForCausalLM)
    assert type(_folded()) is type(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)
    attributes = set(vars(tiny_model()))
    assert type(unfold(model)) is LlamaForCausalLM and set(vars(model)) == attributes
    out = model.generate(random_ids(1, 9), return_dict_in_generate=True, **OPTIONS)
    assert type(out.past_key_values) is DynamicCache


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_step_over_the_byte_limit_is_as_if_never_taken(family):
    model = fold(tiny_model(family), DMC(delay=2))
    scramble_decisions(model)
    ids, free = random_ids(2, 40), new_cache(model)
    model(ids[:, :20], past_key_values=free)
    cache = new_cache(model, page_size=32, max_bytes=3 * free.allocated_nbytes())
    model(ids[:, :8], past_key_values=cache)
    held = cache.allocated_nbytes()
    with pytest.raises(ValueError, match="max_bytes"):
        model(random_ids(2, 400), past_key_values=cache)
    assert cache.allocated_nbytes() == held and cache.get_seq_length() == 8
    want = model(ids[:, :12], use_cache=False).logits[:, 8:]
    got = model(ids[:, 8:12], past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_a_saved_cache_of_pooled_heads_or_of_a_dial_goes_on_as_it_was(tmp_path):
    ids, path = random_ids(1, 12), tmp_path / "cache"
    policy = DMC(cr=2, max_cr=8, delay=2, kv_heads=1)
    model = fold(tiny_model(), policy)
    cache = new_cache(model, cr=4)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        cache.save(path)
        again = new_cache(model, cr=4).load(path)
        one, other = (model(ids[:, 8:], past_key_values=c).logits for c in (cache, again))
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="saved with cr=4"):
        new_cache(model).load(path)
