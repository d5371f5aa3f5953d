"""Pooled kv heads: the cache holds fewer heads, and pooling is that of the weights."""

from __future__ import annotations

import pytest
import torch

from cachefold import GQA, Full, fold, folded, get_policy
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, tiny_model


def pooled_twin(model, kv_heads: int):
    """A dense model whose key and value weights are the means over groups of heads."""
    twin = tiny_model(num_key_value_heads=kv_heads)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = tensor.unflatten(0, (kv_heads, -1, model.config.head_dim)).mean(1)
            state[name] = state[name].flatten(0, 1)
    twin.load_state_dict(state)
    return twin


def test_pooled_heads_equal_a_model_with_pooled_weights():
    model, ids = tiny_model(), random_ids(2, 20)
    want = pooled_twin(model, 1)(ids).logits
    with folded(model, GQA(kv_heads=1)):
        cache = new_cache(model)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            pieces = [
                model(part, past_key_values=cache).logits for part in ids.split([9, 10, 1], 1)
            ]
        torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-5)
        assert cache.compression_ratio() == 2.0 and cache.map().shape == (2, 1)
        assert 2 * cache.nbytes() <= cache.dense_nbytes() + 4096  # the open entry is in float32


def test_full_keeps_every_token_and_changes_nothing():
    model, ids = tiny_model(), random_ids(2, 20)
    want = model(ids).logits
    with folded(model, Full()):
        out = model(ids)
        torch.testing.assert_close(out.logits, want)
        assert out.past_key_values.compression_ratio() == 1.0
        assert not [name for name, _ in model.named_parameters() if "decision" in name]


def test_head_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kv_heads is how many kv heads are left"):
        GQA(kv_heads=0)
    with pytest.raises(ValueError, match="use policy full"):
        GQA(kv_heads=None)
    model = tiny_model()
    with pytest.raises(ValueError, match="kv_heads=3 doesn't divide the 2 kv heads"):
        fold(model, GQA(kv_heads=3))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert get_policy(**GQA(kv_heads=2).to_dict()) == GQA(kv_heads=2)
    assert get_policy(**Full().to_dict()) == Full()
