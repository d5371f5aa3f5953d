"""LoRA: leaves with the fold, and is switched off without a trace."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cachefold import DMC, fold, folded, load_folded, save_folded, unfold
from cachefold.evaluation.perplexity import heldout_loss
from cachefold.models.families import project
from cachefold.models.fold import FoldRun, merge_weights, new_cache
from cachefold.models.lora import adapted_modules, adapters_disabled, add_lora, lora_rank
from tests.models.tiny import random_ids, tiny_model


def _trained(family="Llama"):
    model = add_lora(fold(tiny_model(family), DMC(delay=2)), 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_unfold_removes_lora(family, tmp_path):
    original, ids = tiny_model(family), random_ids(1, 9)
    model = _trained(family)
    assert not torch.equal(model(ids).logits, original(ids).logits) and lora_rank(model) == 4
    unfold(model)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert not adapted_modules(model) and set(vars(model)) == set(vars(original))
    model.save_pretrained(tmp_path)
    loaded, facts = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    assert torch.equal(loaded.eval()(ids).logits, original(ids).logits)


def test_merging_leaves_lora_from_before_the_fold_alone():
    model = merge_weights(fold(add_lora(tiny_model(), 4), DMC()))
    assert adapted_modules(unfold(model))


def test_lora_from_before_the_fold_stays():
    model, ids = add_lora(tiny_model(), 4), random_ids(1, 9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before, adapted = model(ids).logits, set(adapted_modules(model))
    unfold(fold(model, DMC()))
    assert adapted and set(adapted_modules(model)) == adapted
    assert torch.equal(model(ids).logits, before) and hasattr(model, "peft_config")
    assert isinstance(model, LlamaForCausalLM)


def test_disabling_adapters_restores_switches_and_gradients():
    model, ids = _trained(), random_ids(1, 9)
    layers = list(adapted_modules(model).values())
    layers[0].enable_adapters(False)
    next(layers[1].parameters()).requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "layers.1" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), adapters_disabled(model):
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
        raise KeyError
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [layer.disable_adapters for layer in layers] == [True] + [False] * (len(layers) - 1)


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_merged_adapters_change_nothing_but_what_can_be_taken_back(family, tmp_path):
    model, ids = _trained(family), random_ids(1, 9)
    before = model(ids).logits
    assert merge_weights(model) is model and not adapted_modules(model)
    torch.testing.assert_close(model(ids).logits, before)
    for use in (unfold, lambda model: save_folded(model, tmp_path, base={"id": "tiny"})):
        with pytest.raises(ValueError, match="merged into the weights"):
            use(model)
    assert not list(tmp_path.iterdir())


def test_a_merged_model_has_no_dense_self_to_be_compared_with():
    model = merge_weights(_trained())
    with pytest.raises(ValueError, match="compared with its dense self"):
        heldout_loss(model, None, [])
    with pytest.raises(ValueError, match='can\'t be run in mode "dense"'):
        model(random_ids(1, 9), fold_run=FoldRun(mode="dense"))


def test_mode_dense_is_the_original_model_only_without_adapters():
    model, ids = _trained(), random_ids(1, 9)
    dense, original = FoldRun(mode="dense"), tiny_model()(ids).logits
    assert not torch.allclose(model(ids, fold_run=dense).logits, original, atol=1e-3)
    with adapters_disabled(model):
        assert torch.equal(model(ids, fold_run=dense).logits, original)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3"])
def test_nothing_to_merge_leaves_the_way_back(family):
    original, ids = tiny_model(family), random_ids(1, 9)
    model = fold(tiny_model(family), DMC())
    before, names = model(ids).logits, set(model.state_dict())
    merge_weights(model)
    torch.testing.assert_close(model(ids).logits, before)
    assert set(model.state_dict()) == names
    unfold(model)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert len([*model.buffers()]) == len([*original.buffers()])
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    with pytest.raises(ValueError, match="not folded"):
        merge_weights(model)


def test_queries_keys_and_values_come_from_one_product(monkeypatch):
    model = merge_weights(fold(tiny_model(), DMC())).requires_grad_(False)
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 3, 32)
    apart = [linear(hidden) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        monkeypatch.setattr(linear, "forward", None)
    for joined, part in zip(project(attention, hidden), apart, strict=True):
        torch.testing.assert_close(joined.transpose(1, 2).flatten(2), part)


def _changed(change):
    """A merged model, changed, and one that was never merged, changed in the same way."""
    models = [merge_weights(fold(tiny_model("Qwen2"), DMC())), fold(tiny_model("Qwen2"), DMC())]
    for model in models:
        torch.manual_seed(0)
        change(model)
    return models


def _train_adapters(model):
    add_lora(model, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def _double_weights(model):
    model.double()
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()


def _write_in_place(model):
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data.mul_(2)
    attention.q_proj.bias.data.fill_(1)


@pytest.mark.parametrize("change", [_train_adapters, _double_weights, _write_in_place])
def test_what_is_changed_after_merging_counts(change):
    """Through a chunk and a step: there the projections are the fold's own."""
    merged, apart = _changed(change)
    ids = random_ids(1, 9)
    for model in (merged, apart):
        model.logits = []
        cache = new_cache(model)
        with torch.no_grad():
            for part in ids.split([4, 4, 1], 1):
                model.logits.append(model(part, past_key_values=cache).logits)
    for one, other in zip(merged.logits, apart.logits, strict=True):
        torch.testing.assert_close(one, other)


def test_merged_weights_are_trained_where_asked():
    model = merge_weights(fold(tiny_model(), DMC()))
    logits = model(random_ids(1, 9), fold_run=FoldRun(mode="relaxed"), use_cache=False).logits
    logits.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "_proj" in name)


def _wrapped(model):
    """A PeftModel around a model, with adapters that change its logits; always the same."""
    torch.manual_seed(1)
    wrapper = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in wrapper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return wrapper


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_base_with_adapters_takes_no_artefact_and_keeps_them(tmp_path, rank, wrapped):
    artefact = _trained() if rank else fold(tiny_model(), DMC(delay=2)).requires_grad_(False)
    save_folded(artefact, tmp_path, base={"id": "tiny"})
    wrapper, ids = _wrapped(tiny_model()), random_ids(1, 9)
    model = wrapper if wrapped else wrapper.get_base_model()
    before, flags = model(ids).logits, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="on 4 modules such as .*q_proj; merge or remove your"):
        load_folded(tmp_path, model)
    assert torch.equal(model(ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    load_folded(tmp_path, wrapper.merge_and_unload())  # as the message says


def test_adapters_are_not_added_over_others():
    model, ids = _trained(), random_ids(1, 9)
    before = model(ids).logits
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, 2)
    assert torch.equal(model(ids).logits, before) and lora_rank(model) == 4
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_wrapped_model_is_refused_and_the_model_in_it_folds(tmp_path):
    wrapper, ids, policy = _wrapped(tiny_model()), random_ids(1, 9), DMC(delay=2)
    before = wrapper(ids).logits
    for refused in (
        lambda: fold(wrapper, policy),
        lambda: folded(wrapper, policy).__enter__(),
        lambda: unfold(wrapper),
        lambda: save_folded(wrapper, tmp_path / "a", base={"id": "tiny"}),
    ):
        with pytest.raises(ValueError, match=r"model\.get_base_model\(\)"):
            refused()
    assert torch.equal(wrapper(ids).logits, before)
    model = fold(wrapper.get_base_model(), policy)
    for either in (wrapper, model):
        assert torch.equal(either(ids).logits, before)
        out = either.generate(input_ids=ids, max_new_tokens=3, return_dict_in_generate=True)
        assert type(out.past_key_values).__name__ == "FoldedCache"


def test_a_folded_model_can_be_wrapped():
    ids = random_ids(1, 9)
    wrapper = _wrapped(fold(tiny_model(), DMC(delay=2)))
    assert torch.equal(wrapper(ids).logits, _wrapped(tiny_model())(ids).logits)
    out = wrapper.generate(input_ids=ids, max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values).__name__ == "FoldedCache"


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match=r"a transformers.PreTrainedModel is needed.*nn.*Linear"):
        fold(torch.nn.Linear(2, 2), DMC())
