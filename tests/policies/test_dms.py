"""DMS: what a merge into an entry of one token comes to is an eviction."""

from __future__ import annotations

import pytest
import torch

from cachefold import DMCC, DMS, fold, get_policy
from cachefold.models.fold import new_cache
from tests.models.test_step import feed
from tests.models.tiny import random_ids, scramble_decisions, tiny_model


def kept_tokens(alpha: list[float], delay: int) -> list[int]:
    """Tokens that the last query sees, from the paper: a mark evicts once it is `delay` old.

    The mark on a token is read at the one that follows it.
    """
    last = len(alpha) - 1
    return [j for j in range(last + 1) if j + 1 > last - delay or alpha[j + 1] == 0]


@pytest.mark.parametrize("delay", [0, 3])
def test_attention_sees_the_tokens_that_are_kept_and_no_other(delay):
    """Against attention of the model's own layer over the kept keys and values."""
    from cachefold.core.decisions import Decisions
    from cachefold.models.run import FoldRun

    model = fold(tiny_model(num_hidden_layers=1), DMS(delay=delay))
    scramble_decisions(model)
    ids, seen = random_ids(1, 24), {}
    layer = model.model.layers[0].self_attn
    inputs = {}
    layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    outputs = []
    layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    run = FoldRun(recorder=seen)
    model(ids, use_cache=False, fold_run=run)
    decisions: Decisions = seen[0]
    assert 0.2 < decisions.alpha[..., 1:].mean() < 0.8
    query, key, value = projected(layer, inputs)
    group = query.shape[1] // key.shape[1]
    for h in range(query.shape[1]):
        kept = kept_tokens(decisions.alpha[0, h // group].tolist(), delay)
        scores = key[0, h // group, kept] @ query[0, h, -1] * layer.scaling
        want = torch.softmax(scores, 0) @ value[0, h // group, kept]
        got = outputs[0][0, -1].unflatten(-1, (query.shape[1], -1))[h]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def projected(layer, inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated query, rotated key and value by the formulas of the Llama layer."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden, cos_sin = inputs["hidden_states"], inputs["position_embeddings"]
    query, key, value = (
        part(hidden).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    return *apply_rotary_pos_emb(query, key, *cos_sin), value


def test_single_tokens_are_steps_in_place():
    model, ids = fold(tiny_model(), DMS(delay=3)), random_ids(2, 10)
    cache = new_cache(model)
    feed(model, ids, [0, 9, 10], cache)
    assert cache.layers[0].turn is not None


def test_there_is_nothing_to_weigh():
    decision = DMS().build_decision(8, 2, 4)
    assert decision.weight.shape == (2, 8)
    _, omega = decision(None, None, torch.randn(1, 5, 8))
    assert torch.equal(omega, torch.ones(1, 2, 5))


def test_options_are_checked_and_survive_their_dict():
    with pytest.raises(ValueError, match="^delay is a whole number"):
        DMS(delay=-1)
    with pytest.raises(ValueError, match="no option 'window'"):
        get_policy("dms", window=12)
    policy = DMS(cr=3, delay=4, per="layer")
    assert get_policy(**policy.to_dict()) == policy


def test_dmc_c_shares_decisions_in_a_layer():
    policy = DMCC(cr=3)
    assert get_policy(**policy.to_dict()) == policy and policy.to_dict()["name"] == "dmc-c"
    logits, _ = policy.share(torch.randn(2, 3, 4), torch.ones(2, 3, 4))
    assert (logits == logits[:, :1]).all()
    with pytest.raises(ValueError, match="which is policy dmc"):
        DMCC(per="head")
