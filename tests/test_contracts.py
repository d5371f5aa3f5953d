"""Private touchpoints with transformers, peft and accelerate: what this package counts on."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, GenerationMixin, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from cachefold.models import families
from tests.models.tiny import FAMILIES, tiny_model


def test_generation_prepares_its_cache_where_the_mixin_overrides_it():
    parameters = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert parameters[:3] == ["self", "generation_config", "model_kwargs"]
    assert "_prepare_cache_for_generation(" in inspect.getsource(GenerationMixin.generate)


def test_generation_config_has_the_options_that_are_read():
    config = transformers.GenerationConfig()
    assert config.cache_implementation is None and hasattr(config, "use_cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_layers_have_what_is_read(family):
    model = tiny_model(family)
    for index, attention in enumerate(families.attention_layers(model)):
        assert attention.layer_idx == index and attention.scaling > 0 and attention.head_dim > 0
        assert hasattr(attention, "qkv_proj") or hasattr(attention, "k_proj")
        parameters = inspect.signature(type(attention).forward).parameters
        assert {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"} <= set(
            parameters
        )
        assert "forward" not in vars(attention)


def test_a_dynamic_cache_is_made_of_layers_that_can_be_replaced():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2
    assert "layers" in inspect.signature(Cache.__init__).parameters
    for name in ("update", "get_seq_length", "get_mask_sizes", "reset", "reorder_cache"):
        assert hasattr(CacheLayerMixin, name)
    layer = DynamicLayer()
    layer.lazy_initialization(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert layer.is_initialized and hasattr(layer, "keys") and hasattr(layer, "values")
    assert "cumulative_length" in vars(DynamicSlidingWindowLayer(sliding_window=4))


def test_a_4d_mask_hides_padding_from_its_own_row():
    """`valid_tokens` tells padding from packed texts by the diagonal."""
    from transformers.masking_utils import create_causal_mask

    model = tiny_model()
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(1, 4, 32),
        attention_mask=torch.tensor([[0, 0, 1, 1]]),
        past_key_values=None,
    )
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].diagonal().tolist() == [False, False, True, True]
    assert mask[0, 0, -1].tolist() == [False, False, True, True]


def test_peft_layers_can_be_switched_and_taken_out():
    model = tiny_model()
    linear = model.model.layers[0].self_attn.q_proj
    before = set(vars(model))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, BaseTunerLayer) and layer.get_base_layer() is linear
    assert layer.disable_adapters is False
    layer.enable_adapters(False)
    assert layer.disable_adapters is True
    assert set(vars(model)) - before == {"peft_config"}


def test_accelerate_hooks_put_forward_on_the_instance():
    module = torch.nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    assert "forward" in vars(module)
