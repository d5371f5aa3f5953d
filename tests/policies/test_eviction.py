"""All training-free policies: against loops written from the papers, in any split of a text."""

from __future__ import annotations

import math

import pytest
import torch

from cachefold import H2O, TOVA, Random, Streaming, fold, folded, get_policy
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, tiny_model
from tests.policies.test_dms import projected

POLICIES = [
    H2O(budget=8), H2O(cr=2.0), TOVA(budget=8), TOVA(cr=2.0), Streaming(budget=8),
    Streaming(cr=3.0), Random(budget=8), Random(cr=2.0, seed=3),
]  # fmt: skip


def kept_by_loop(policy, query, key, scaling: float, packed=None) -> list[list[list[int]]]:
    """Tokens that every kv head holds while each query attends, by token and head.

    `packed` are the keys as a codec makes them, which queries see of all but the first 4 tokens
    and the newest 32.
    """
    heads, kv_heads, tokens = query.shape[0], key.shape[0], query.shape[1]
    group = heads // kv_heads
    held: list[list[int]] = [[] for _ in range(kv_heads)]
    sums = [[0.0] * tokens for _ in range(kv_heads)]
    seen = []
    for t in range(tokens):
        for k in range(kv_heads):
            held[k].append(t)
        seen.append([list(some) for some in held])
        weights = [[0.0] * tokens for _ in range(heads)]
        for h in range(heads):
            some = held[h // group]
            seen_as = [key if packed is None or j < 4 or t - j < 32 else packed for j in some]
            scores = [float(keys[h // group, j] @ query[h, t]) * scaling
                      for keys, j in zip(seen_as, some, strict=True)]  # fmt: skip
            top = max(scores)
            total = sum(math.exp(s - top) for s in scores)
            for j, s in zip(some, scores, strict=True):
                weights[h][j] = math.exp(s - top) / total
                sums[h // group][j] += weights[h][j]
        allowed = policy.budget or max(math.ceil((t + 1) / policy.cr), policy.minimum)
        mean = [sum(row[j] for row in weights) / heads for j in range(tokens)]
        for k in range(kv_heads):
            while len(held[k]) > allowed:
                if policy.name == "h2o":
                    recent = min(max(int(allowed * 0.5), 1), allowed - 1)
                    going = min((j for j in held[k] if j <= t - recent), key=sums[k].__getitem__)
                elif policy.name == "tova":
                    going = min(held[k], key=mean.__getitem__)
                else:
                    going = min(j for j in held[k] if j >= policy.sinks)
                held[k].remove(going)
    return seen


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.name != "random"], ids=repr)
def test_attention_sees_what_a_plain_loop_keeps(policy):
    model, ids = fold(tiny_model(num_hidden_layers=1), policy), random_ids(1, 40)
    layer, inputs, outputs = model.model.layers[0].self_attn, {}, []
    layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(ids)
        query, key, value = (x[0] for x in projected(layer, inputs))
    seen = kept_by_loop(policy, query, key, layer.scaling)
    group, got = query.shape[0] // key.shape[0], outputs[0][0].unflatten(-1, (query.shape[0], -1))
    for t in range(40):
        for h in range(query.shape[0]):
            kept = seen[t][h // group]
            weights = torch.softmax(key[h // group, kept] @ query[h, t] * layer.scaling, 0)
            want = weights @ value[h // group, kept]
            torch.testing.assert_close(got[t, h], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])  # Llama: test_all
def test_any_split_of_a_padded_text_gives_the_same(policy, family):
    model, ids = fold(tiny_model(family), policy), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for sizes in ([40], [25, 1, 1, 13], [1] * 40):
        cache, pieces, start = new_cache(model), [], 0
        for size in sizes:
            part, upto = ids[:, start : start + size], mask[:, : start + size]
            with torch.no_grad():
                out = model(part, attention_mask=upto, past_key_values=cache)
            pieces.append(out.logits)
            start += size
        results.append(torch.cat(pieces, 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=2e-5)
    allowed = policy.allowed(torch.tensor([33, 40]))
    assert all((entries == allowed[:, None]).all() for entries in cache.entries())
    assert cache.compression_ratio() > 1.5


@pytest.mark.parametrize("policy", POLICIES[::2], ids=repr)
def test_a_row_alone_equals_the_row_in_a_batch_and_generate_works(policy):
    check_rows(fold(tiny_model(), policy), random_ids(2, 30), padding=6)


def check_rows(model, ids, padding):
    """A padded row of a batch is continued as it is alone, greedily and with beams."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    for beams in (1, 3):
        settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
        both = model.generate(ids, attention_mask=mask, **settings)[0, padding:]
        alone = model.generate(ids[:1, padding:], **settings)[0]
        assert torch.equal(both[: len(alone)], alone)


def test_no_trace_is_left_behind():
    model, ids = tiny_model(), random_ids(1, 20)
    names, want = list(model.state_dict()), model(ids).logits
    with folded(model, TOVA(budget=4)):
        assert not torch.equal(model(ids).logits, want)
    assert type(model).__name__ == "LlamaForCausalLM" and list(model.state_dict()) == names
    assert torch.equal(model(ids).logits, want) and not hasattr(model.config, "cachefold")


@pytest.mark.parametrize("name", ["h2o", "tova", "streaming", "random"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match="needs one of budget .* and cr .*got neither"):
        get_policy(name)
    with pytest.raises(ValueError, match="needs one of budget"):
        get_policy(name, budget=8, cr=2.0)
    with pytest.raises(ValueError, match=f"for {name} at least"):
        get_policy(name, budget=0)
    with pytest.raises(ValueError, match="must be a finite number >= 1"):
        get_policy(name, cr=0.5)
    policy = get_policy(name, cr=2.0)
    assert get_policy(**policy.to_dict()) == policy


def test_a_budget_below_sinks_and_newest_is_refused_with_the_minimum():
    with pytest.raises(ValueError, match="for streaming at least 5; got 4"):
        Streaming(budget=4)


def test_padding_that_is_nan_leaves_no_trace_in_scores():
    """Padding after real tokens: its query sees entries, and would spoil their scores."""
    model, ids = fold(tiny_model(), H2O(budget=8)), random_ids(1, 24)
    mask = torch.ones_like(ids)
    mask[0, 12] = 0
    embedded = model.get_input_embeddings()(ids).detach()
    outputs = []
    for filling in (0.5, float("nan")):
        embedded[0, 12] = filling
        cache = new_cache(model)
        with torch.no_grad():
            out = model(inputs_embeds=embedded, attention_mask=mask, past_key_values=cache)
        outputs.append(out.logits[0, mask[0].bool()])
    assert torch.equal(*outputs)
