"""Decision `neuron`: out of attention before and after RoPE, zero-out stage, zeroed rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cachefold import DMC, FoldRun, fold
from cachefold.core.rotary import rotate
from cachefold.models import families
from cachefold.models.fold import zero_decision_neurons
from cachefold.models.lora import add_lora
from tests.models.tiny import random_ids, tiny_model

NEURON = DMC(decision="neuron", delay=2)


def _half_merging(model, neuron=-1):
    """Makes about half of the tokens merge: the channel of the keys is spread around c = 5."""
    for layer in model.model.layers:
        rows = layer.self_attn.k_proj.weight.data.unflatten(0, (-1, layer.self_attn.head_dim))
        rows[:, neuron] *= 1e3
    return model


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("neuron", [-1, 3])
def test_append_is_plain_attention_with_the_channel_scaled_twice(factor, neuron):
    model = fold(tiny_model(num_hidden_layers=1), DMC(decision="neuron", neuron=neuron))
    attention = model.model.layers[0].self_attn
    states = torch.randn(2, 9, 32)
    position = model.model.rotary_emb(states, torch.arange(9)[None])
    query, key, value = families.project(attention, states)
    scale = torch.ones(8)
    scale[neuron] = factor
    query, key = (rotate(x * scale, *position) * scale for x in (query, key))
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = attention.o_proj(expected.transpose(1, 2).flatten(2))
    recorder = {}
    run = FoldRun(mode="append", zero_out=factor, recorder=recorder)
    actual, _ = attention(states, position_embeddings=position, fold_run=run)
    torch.testing.assert_close(actual, expected)
    assert not recorder[0].alpha.any() and recorder[0].logits.shape == (2, 2, 9)


def test_an_untouched_channel_gives_the_original_model():
    model, ids = fold(tiny_model(), NEURON), random_ids(1, 15)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    dense, full, none = (
        model(ids, attention_mask=mask, use_cache=False, fold_run=run).logits[0, 3:]
        for run in (
            FoldRun(mode="dense"),
            FoldRun(mode="append", zero_out=1.0),
            FoldRun(mode="append"),
        )
    )
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-5)
    assert (none - dense).abs().max() > 100 * (full - dense).abs().max()


@pytest.mark.parametrize("factor", [0.0, 0.5])
@pytest.mark.parametrize("neuron", [-1, 3])
def test_the_channel_is_scaled_alike_in_cache_and_whole_text(factor, neuron):
    model = fold(tiny_model(), DMC(decision="neuron", neuron=neuron, delay=2))
    _half_merging(model, neuron)
    ids, run = random_ids(1, 24), FoldRun(zero_out=factor)
    whole = model(ids, use_cache=False, fold_run=run).logits
    cache, pieces = None, []
    for start, stop in [(0, 10), *((i, i + 1) for i in range(10, 24))]:
        out = model(ids[:, start:stop], past_key_values=cache, fold_run=run)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert cache.compression_ratio() > 1.1
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-5)
    if factor == 0:
        assert all(not layer.tensors()["closed_key"][..., neuron].any() for layer in cache.layers)


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen2", "Qwen3", "Gemma3Text"])
def test_zeroing_the_neurons_ends_the_zero_out_stage(family):
    model, ids = fold(tiny_model(family), NEURON), random_ids(1, 15)
    if family == "Qwen2":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    before = model(ids, use_cache=False, fold_run=FoldRun(mode="append")).logits
    zero_decision_neurons(model)
    recorder = {}
    run = FoldRun(mode="append", recorder=recorder)
    after = model(ids, use_cache=False, fold_run=run).logits
    # A norm over the head sees the channel go, so that the others grow a little.
    normed = family in ("Qwen3", "Gemma3Text")
    assert torch.allclose(after, before, atol=0.02) if normed else torch.equal(after, before)
    for decisions in recorder.values():
        assert torch.equal(decisions.logits, torch.full_like(decisions.logits, -5.0))
    # A linear layer whose row is 0 still learns.
    model.train()
    model(ids, fold_run=FoldRun(mode="relaxed", temperature=2.0)).logits.pow(2).mean().backward()
    attention = families.attention_layers(model)[-1]
    rows = families.query_key_rows(attention)
    weights = [attention.qkv_proj.weight] if family == "Phi3" else rows[:1]
    assert all(weight.grad.isfinite().all() for weight in weights)


def test_zeroing_neurons_needs_neurons_and_full_weights():
    with pytest.raises(ValueError, match="not folded"):
        zero_decision_neurons(tiny_model())
    with pytest.raises(ValueError, match='only decision "neuron"'):
        zero_decision_neurons(fold(tiny_model(), DMC()))
    with pytest.raises(ValueError, match="full weights"):
        zero_decision_neurons(add_lora(fold(tiny_model(), NEURON), 2))
