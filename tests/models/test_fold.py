"""Folding real model classes: fresh equality, generation, padding, beams, continuation."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from transformers import DynamicCache

from cachefold import DMC, TOVA, FoldedCache, FoldRun, fold, folded, is_folded, unfold
from cachefold.attention import dispatch
from cachefold.core.accounting import entries_kept
from cachefold.models.fold import folded_layers, new_cache
from tests.models.tiny import FAMILIES, random_ids, scramble_decisions, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_fold_changes_no_logit(family):
    model, ids = tiny_model(family), random_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = model(**inputs, use_cache=False).logits
    keys = set(model.state_dict())
    fold(model, DMC())
    for use_cache in (False, True):
        assert torch.equal(model(**inputs, use_cache=use_cache).logits, before)
    assert keys < set(model.state_dict())
    unfold(model)
    assert set(model.state_dict()) == keys and not is_folded(model)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("delay", "window"), [(0, None), (4, None), (4, 3), (40, None)])
def test_token_by_token_equals_parallel(family, delay, window):
    model = fold(tiny_model(family), DMC(delay=delay, window=window))
    scramble_decisions(model)
    ids = random_ids(2, 26)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    recorder = {}
    whole = model(
        ids, attention_mask=mask, use_cache=False, fold_run=FoldRun(recorder=recorder)
    ).logits
    assert any(decisions.alpha.any() for decisions in recorder.values())
    pieces, cache = [], None
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 15), *((i, i + 1) for i in range(15, 26))]:
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        pieces.append(out.logits)
    assert isinstance(cache, FoldedCache)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=1e-4, atol=2e-5)
    for entries, decisions in zip(cache.entries(), recorder.values(), strict=True):
        assert torch.equal(entries, entries_kept(decisions.alpha, real, delay))


def test_generate_greedy_equals_rescoring_the_whole_text():
    model = fold(tiny_model(), DMC(delay=3))
    scramble_decisions(model)
    ids = random_ids(1, 12)
    out = model.generate(
        ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert out.past_key_values.compression_ratio() > 1
    logits = model(out.sequences, use_cache=False).logits[:, 11:-1]
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits.argmax(-1), out.sequences[:, 12:])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_a_left_padded_batch_generates_like_its_rows(options):
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    ids, padding = random_ids(3, 12), [5, 0, 8]
    mask = torch.ones_like(ids)
    for row, start in enumerate(padding):
        mask[row, :start], ids[row, :start] = 0, 0
    options = options | {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **options)
    returned = options.get("num_return_sequences", 1)
    assert batch.shape == (3 * returned, 20)
    for row, start in enumerate(padding):
        alone = model.generate(ids[row : row + 1, start:], **options)
        assert torch.equal(alone, batch[row * returned : (row + 1) * returned, start:])


def test_sampling_a_batch_works():
    model = fold(tiny_model(), DMC(delay=2))
    out = model.generate(random_ids(2, 12), max_new_tokens=8, min_new_tokens=8, do_sample=True)
    assert out.shape == (2, 20)


def test_a_second_turn_continues_the_cache():
    model = fold(tiny_model(), DMC(delay=3))
    scramble_decisions(model)
    first = model.generate(
        random_ids(1, 9), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    longer = torch.cat([first.sequences, random_ids(1, 7, seed=5)], 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    continued = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(continued, model.generate(longer, **options))


def test_sliding_layers_are_reported_and_stay_dense(caplog):
    with caplog.at_level(logging.WARNING):
        fold(tiny_model("Gemma2"), DMC())
    assert "1 of 2 layers use a sliding window" in caplog.text
    with pytest.raises(ValueError, match="no layer can be folded"):
        fold(tiny_model("Mistral", sliding_window=8), DMC())


def test_a_model_of_another_family_is_refused():
    model = tiny_model()
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="Supported families"):
        fold(model, DMC())


def test_folding_twice_and_foreign_caches_are_refused():
    model = fold(tiny_model(), DMC())
    with pytest.raises(ValueError, match="folded already"):
        fold(model, DMC())
    filled = DynamicCache(config=model.config)
    unfold(model)
    with pytest.raises(ValueError, match="not folded"):
        unfold(model)
    model(random_ids(1, 3), past_key_values=filled)
    fold(model, DMC())
    for cache in (filled, DynamicCache(config=model.config)):
        with pytest.raises(ValueError, match="needs a FoldedCache"):
            model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("mode", ["relaxed", "append", "dense"])
def test_only_hard_decisions_go_with_a_folded_cache(mode):
    model = fold(tiny_model(), DMC())
    with pytest.raises(ValueError, match=f"mode '{mode}' can't go on with a FoldedCache"):
        model(random_ids(1, 3), past_key_values=new_cache(model), fold_run=FoldRun(mode=mode))
    assert model(random_ids(1, 3), fold_run=FoldRun(mode=mode)).logits.isfinite().all()
    if mode != "dense":
        with pytest.raises(ValueError, match="no cache to carry"):
            model(random_ids(1, 3), use_cache=True, fold_run=FoldRun(mode=mode))


def test_mistyped_options_get_a_hint():
    with pytest.raises(ValueError, match="Did you mean 'relaxed'"):
        FoldRun(mode="relax")
    with pytest.raises(ValueError, match="Did you mean 'gumbel'"):
        FoldRun(relaxation="gumble")
    model = tiny_model()
    model.config.model_type = "qwen"
    with pytest.raises(ValueError, match="Did you mean 'qwen"):
        fold(model, DMC())


def test_a_model_that_accelerate_runs_is_refused():
    model = tiny_model()
    add_hook_to_module(model.model.layers[1].self_attn, ModelHook())
    with pytest.raises(ValueError, match="attention layer 1 .*accelerate.*device_map"):
        fold(model, DMC())
    assert not is_folded(model) and folded_layers(model) == []
    remove_hook_from_submodules(model)  # leaves its forward on the instance
    with pytest.raises(ValueError, match="load the model anew"):
        fold(model, DMC())


def test_a_fold_that_fails_leaves_no_trace():
    model = tiny_model()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="8 channels"):
        fold(model, DMC(decision="neuron", neuron=8))
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_a_folded_model_can_change_its_dtype():
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    out = model.to(torch.bfloat16)(random_ids(1, 20))
    assert out.logits.dtype == torch.bfloat16 and out.past_key_values.compression_ratio() > 1


def test_packed_texts_are_refused():
    model, ids = fold(tiny_model(), DMC()), random_ids(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with pytest.raises(ValueError, match="several texts packed in one row"):
        model(ids, position_ids=positions, use_cache=False)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for folded_model in (model, fold(tiny_model(), TOVA(budget=4))):
        with pytest.raises(ValueError, match="cu_seq_lens_q packs several texts"):
            folded_model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


def test_save_pretrained_is_refused_while_folded(tmp_path):
    model = fold(tiny_model(), DMC())
    with pytest.raises(ValueError, match="save_folded"):
        model.save_pretrained(tmp_path)
    unfold(model).save_pretrained(tmp_path)


def test_folded_leaves_no_trace_even_after_an_error():
    model = tiny_model()
    attention = type(model.model.layers[0].self_attn)
    with pytest.raises(KeyError), folded(model, DMC()):
        assert is_folded(model)
        raise KeyError
    assert type(model.model.layers[0].self_attn) is attention
    assert not hasattr(model.config, "cachefold")


def test_one_decision_per_layer():
    model = fold(tiny_model(), DMC(per="layer"))
    scramble_decisions(model)
    recorder = {}
    model(random_ids(1, 20), use_cache=False, fold_run=FoldRun(recorder=recorder))
    for decisions in recorder.values():
        assert torch.equal(decisions.alpha[:, 0], decisions.alpha[:, 1])


def test_training_reaches_decisions_and_omega():
    model = fold(tiny_model(), DMC(delay=4))
    scramble_decisions(model)
    model.train()
    model(random_ids(1, 30), fold_run=FoldRun(mode="relaxed")).logits.pow(2).mean().backward()
    for layer in model.model.layers:
        gradient = layer.self_attn.decision.weight.grad
        assert gradient.isfinite().all() and (gradient.abs().sum(-1) > 0).all()


def _gradient(model, ids, **options):
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return model.model.layers[0].self_attn.k_proj.weight.grad.clone()


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=8)])
def test_training_with_hard_decisions_makes_no_cache_that_cuts_gradients(policy, caplog):
    model, ids = fold(tiny_model(), policy), random_ids(2, 24)
    scramble_decisions(model)
    model.train()
    dispatch.tell.cache_clear()
    whole = _gradient(model, ids, use_cache=False)
    assert torch.equal(_gradient(model, ids), whole) and not caplog.records
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, FoldedCache)
    assert isinstance(model.eval()(ids).past_key_values, FoldedCache) and not caplog.records


def test_gradients_that_a_cache_cuts_off_are_told(caplog):
    model, ids = fold(tiny_model(), DMC(delay=2)), random_ids(2, 24)
    scramble_decisions(model)
    whole = _gradient(model.train(), ids)
    for options in ({"use_cache": True}, {"past_key_values": new_cache(model)}):
        dispatch.tell.cache_clear()
        caplog.clear()
        assert not torch.allclose(_gradient(model, ids, **options), whole, rtol=0.05)
        assert "its entries carry no gradient" in caplog.text


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=8)])
def test_attention_weights_are_refused_but_of_the_dense_model(policy):
    model, ids = fold(tiny_model(attn_implementation="eager"), policy), random_ids(2, 24)
    options = {"output_attentions": True}
    for call in (model, model.forward, model.generate):
        with pytest.raises(ValueError, match=r"output_attentions=True.*recorder.*mode=\"dense\""):
            call(ids, **options, **({"use_cache": False} if call != model.generate else {}))
    weights = model(ids, fold_run=FoldRun(mode="dense"), **options).attentions
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 24, 24)] * 2
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="config.output_attentions = False"):
        model(ids)


def test_dropout_of_attention_that_is_not_applied_is_told_once(caplog):
    dispatch.tell.cache_clear()
    fold(tiny_model(), DMC())
    assert "attention_dropout" not in caplog.text
    for _ in range(2):
        fold(tiny_model(attention_dropout=0.25), DMC())
    assert caplog.text.count("attention_dropout=0.25 is not applied") == 1
