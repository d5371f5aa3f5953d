"""A model takes only caches that were made for its policy and its layers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cachefold import DMC, TOVA, FoldedCache, FoldRun, fold
from cachefold.models.dial import dial_position
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

MADE = {"folded_layers": [0, 1], "delay": 2, "window": 4}


def _folded(**options):
    model = fold(tiny_model(), DMC(**({"delay": 2, "window": 4} | options)))
    scramble_decisions(model)
    return model


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"delay": 3}, "delay=3, but .*delay=2"),
        ({"window": None}, "window=None, but .*window=4"),
        ({"kv_heads": 1}, "kv_heads=1, but .*kv_heads=None"),
        ({"proportional": True}, "proportional=True, but .*proportional=False"),
        ({"folded_layers": [0]}, r"folded_layers=\[0\], but .*folded_layers=\[0, 1\]"),
    ],
)
def test_a_cache_of_other_options_is_refused_and_stays_empty(changes, named):
    model, ids = _folded(), random_ids(2, 24)
    cache = FoldedCache(model.config, **(MADE | changes))
    with pytest.raises(ValueError, match=f"made with {named}.*new_cache"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=FoldedCache(model.config, **MADE))


def test_pooled_heads_and_sizes_are_told_from_the_side_of_the_model_too():
    for name, value in (("kv_heads", 1), ("proportional", True)):
        model = _folded(window=None, **{name: value})
        with pytest.raises(ValueError, match=f"folded with {name}={value}"):
            cache = FoldedCache(model.config, [0, 1], delay=2)
            model(random_ids(2, 24), past_key_values=cache)
        model(random_ids(2, 24), past_key_values=new_cache(model))


def test_a_cache_of_another_way_to_compress_is_refused():
    model, ids = _folded(), random_ids(2, 24)
    evicting = fold(tiny_model(), TOVA(budget=8))
    for one, other in ((model, evicting), (evicting, model)):
        with pytest.raises(ValueError, match="this cache was made for"):
            one(ids, past_key_values=new_cache(other))
    missing = FoldedCache(evicting.config, [1], evictor=TOVA(budget=8))
    with pytest.raises(ValueError, match=r"folded_layers=\[1\]"):
        evicting(ids, past_key_values=missing)


def _dialled():
    model = fold(tiny_model(), DMC(cr=2, max_cr=8, delay=2))
    scramble_decisions(model)
    for layer in model.model.layers:
        layer.self_attn.decision.slope.data.fill_(0.2)
    return model


def test_a_dial_is_never_guessed_where_the_call_goes_past_the_model():
    model, ids = _dialled(), random_ids(2, 24)
    for call in (model.forward, model.model):
        for options in ({"use_cache": False}, {"past_key_values": new_cache(model, cr=4)}):
            with pytest.raises(
                ValueError, match=r"no position of it arrived.*Call model\(\.\.\.\)"
            ):
                call(ids, **options)
    for cr in (1.5, 6):
        want = model(ids, past_key_values=new_cache(model, cr=cr)).logits
        run = FoldRun(position=dial_position(model, cr))
        logits = model.forward(ids, use_cache=False, fold_run=run).logits
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=2e-5)


def test_a_compiled_forward_takes_the_dial_from_the_run_and_never_guesses_it():
    torch._dynamo.reset()
    model, ids = _dialled(), random_ids(2, 16)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")

    @torch.inference_mode()
    def decode(forward, **options):
        cache = new_cache(model, cr=4)
        model(ids[:, :12], past_key_values=cache)
        cache.reserve(4)
        steps = [
            forward(
                input_ids=ids[:, i : i + 1], past_key_values=cache,
                position_ids=torch.full((2, 1), i), **options,
            ).logits
            for i in range(12, 16)
        ]  # fmt: skip
        return torch.cat(steps, 1)

    run = FoldRun(position=dial_position(model, 4))
    torch.testing.assert_close(decode(compiled, fold_run=run), decode(model))
    with pytest.raises(Exception, match="no position of it arrived"):
        decode(compiled)


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=8)])
def test_what_the_model_refuses_its_layers_refuse_as_well(policy):
    model, ids = fold(tiny_model(), policy), random_ids(2, 24)
    evictor = policy if isinstance(policy, TOVA) else None
    options = {"delay": 2, "evictor": evictor}
    bad = {
        "made for": FoldedCache(model.config, [0, 1], evictor=None if evictor else TOVA(budget=8)),
        r"folded_layers=\[1\]": FoldedCache(model.config, [1], **options),
        r"got DynamicCache.*not model\.forward": None,  # transformers makes one
    }
    if evictor is None:
        bad["delay=3"] = FoldedCache(model.config, [0, 1], delay=3)
    for call in (model.forward, model.model):
        for message, cache in bad.items():
            with pytest.raises(ValueError, match=message):
                call(ids, past_key_values=cache)
        for mode in ("append", "dense"):
            with pytest.raises(ValueError, match=f"mode '{mode}'"):
                run = FoldRun(mode=mode)
                call(ids, past_key_values=new_cache(model), fold_run=run)
    cache = new_cache(model)
    assert torch.equal(model.forward(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=8)])
def test_a_cache_may_come_by_position(policy):
    model, ids = fold(tiny_model(), policy), random_ids(2, 24)
    scramble_decisions(model)
    cache = new_cache(model)
    assert model(ids[:, :20], None, None, cache).past_key_values is cache
    step = model(ids[:, 20:], torch.ones_like(ids), None, cache).logits
    torch.testing.assert_close(step, model(ids).logits[:, 20:], rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="needs a FoldedCache, got DynamicCache"):
        model(ids, None, None, DynamicCache())
    with pytest.raises(TypeError, match="multiple values for argument 'attention_mask'"):
        model(ids, None, attention_mask=None)
