"""Folding real model classes: fresh equality, generation, padding, beams, continuation."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DynamicCache

from cachefold import DMC, FoldedCache, FoldRun, fold, folded, is_folded, unfold
from cachefold.core.accounting import entries_kept
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
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_a_left_padded_batch_generates_like_its_rows(options):
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    torch.manual_seed(0)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **options)
    assert batch.shape == (2 * options.get("num_return_sequences", 1), 20)
    if options.get("do_sample"):
        return
    returned = options.get("num_return_sequences", 1)
    row = model.generate(ids[:1, 5:], max_new_tokens=8, min_new_tokens=8, **options)
    assert torch.equal(row, batch[:returned, 5:])


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
    with pytest.raises(ValueError, match="supported families"):
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
    with pytest.raises(ValueError, match="needs a FoldedCache"):
        model(random_ids(1, 1), past_key_values=filled)


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


def test_neuron_decisions_leave_attention():
    model, ids = tiny_model(), random_ids(1, 15)
    fold(model, DMC(decision="neuron"))
    full, none = (
        model(ids, use_cache=False, fold_run=FoldRun(zero_out=factor)).logits
        for factor in (1.0, 0.0)
    )
    dense = model(ids, use_cache=False, fold_run=FoldRun(mode="dense")).logits
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-5)
    assert (none - dense).abs().max() > 100 * (full - dense).abs().max()


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
