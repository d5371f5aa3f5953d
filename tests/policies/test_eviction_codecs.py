"""Every codec with every training-free policy: any split, any batch, bytes, limits, files."""

from __future__ import annotations

import copy

import pytest
import torch

from cachefold import H2O, TOVA, Random, Streaming, fold, folded
from cachefold.cache.codecs import Vectors, get_codec, list_codecs
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, tiny_model
from tests.policies.test_all import CODECS
from tests.policies.test_dms import projected
from tests.policies.test_eviction import check_rows, kept_by_loop

# Old entries stay under all of them: only what is older than 32 tokens is read packed.
POLICIES = [H2O(budget=40), TOVA(cr=1.5), Streaming(budget=50), Random(cr=1.5, seed=3)]


def feed(model, cache, ids, mask=None, start: int = 0) -> torch.Tensor:
    """(B, T, vocabulary) logits of the tokens from `start` on."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model(ids[:, start:], attention_mask=mask, past_key_values=cache).logits


# The others are in test_all.
@pytest.mark.parametrize("codec", sorted({*list_codecs()} - {*CODECS}))
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_any_split_of_a_padded_text_gives_the_same(policy, codec):
    """In float64: a rounding error must not move a number to another point of the grid."""
    model, ids = fold(tiny_model().double(), policy), random_ids(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for sizes in ([70], [25, 1, 1, 16, 27], [1] * 70):
        cache, pieces, end = new_cache(model, codec=codec), [], 0
        for size in sizes:
            start, end = end, end + size
            pieces.append(feed(model, cache, ids[:, :end], mask[:, :end], start))
        results.append(torch.cat(pieces, 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-9)
    exact = feed(model, new_cache(model), ids, mask)[mask.bool()]
    assert not torch.equal(results[0], exact)


@pytest.mark.parametrize("codec", ["int2", "mixed", "kvquant-3"])
@pytest.mark.parametrize("policy", POLICIES[:3], ids=repr)
def test_attention_sees_what_a_plain_loop_keeps(policy, codec):
    model = fold(tiny_model(num_hidden_layers=1), policy, codec=codec)
    ids, layer, inputs, outputs = random_ids(1, 60), model.model.layers[0].self_attn, {}, []
    layer.register_forward_pre_hook(lambda _, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    layer.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    feed(model, new_cache(model), ids)
    with torch.no_grad():
        query, key, value = (x[0] for x in projected(layer, inputs))
    packed = [
        vectors.decode(vectors.encode(x))
        for x, vectors in zip(
            (key, value), [Vectors(part, 8) for part in get_codec(codec).alone()], strict=True
        )
    ]
    seen = kept_by_loop(policy, query, key, layer.scaling, packed[0])
    group, got = query.shape[0] // key.shape[0], outputs[0][0].unflatten(-1, (query.shape[0], -1))
    for t in range(60):
        for h in range(query.shape[0]):
            kept = torch.tensor(seen[t][h // group])
            new = ((kept < 4) | (t - kept < 32))[:, None]
            keys, values = (
                torch.where(new, exact[h // group, kept], old[h // group, kept])
                for exact, old in zip((key, value), packed, strict=True)
            )
            weights = torch.softmax(keys @ query[h, t] * layer.scaling, 0)
            torch.testing.assert_close(got[t, h], weights @ values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_row_alone_equals_the_row_in_a_batch_and_beams_work(policy):
    check_rows(fold(tiny_model().double(), policy, codec="int4"), random_ids(2, 60), padding=9)


@pytest.mark.parametrize("codec", list_codecs())
def test_bytes_are_those_of_packed_entries(codec):
    """2000 entries of 64 + 64 channels in bfloat16, of a text that is fed at once."""
    model = tiny_model(num_hidden_layers=1, head_dim=64).bfloat16()
    with folded(model, Streaming(budget=2000)):
        plain, cache = new_cache(model), new_cache(model, codec=codec)
        ids = random_ids(1, 2100)
        for each in (plain, cache):
            feed(model, each, ids)
            feed(model, each, torch.cat([ids, ids[:, :1]], 1), start=2100)
    width = sum(Vectors(part, 64).nbytes for part in get_codec(codec).alone())
    assert plain.nbytes() == 2 * 2000 * (256 + 4)
    assert cache.nbytes() == 2 * (2000 * (width + 4) + 36 * 256)
    # One slot is free for the next token, and each head has the number of it.
    assert cache.allocated_nbytes() == cache.nbytes() + 2 * (width + 4 + 8) + 8
    assert cache.dense_nbytes() == plain.dense_nbytes() == 2 * 2101 * 256
    assert cache.compression_ratio() == plain.compression_ratio() == 2101 / 2000
    if codec == "int4":
        assert cache.allocated_nbytes() < 0.35 * plain.allocated_nbytes()


def state(cache) -> list:
    return [{name: part.tolist() for name, part in layer.tensors().items()}
            for layer in cache.layers]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("more", [1, 40])
def test_a_refused_step_changes_nothing(policy, more):
    model, ids = fold(tiny_model(), policy, codec="int4"), random_ids(2, 110)
    cache, free = new_cache(model, max_bytes=10**9), new_cache(model)
    for each in (cache, free):
        feed(model, each, ids[:, :45])
        for end in range(46, 71):
            feed(model, each, ids[:, :end], start=end - 1)
    kept, held = state(cache), cache.allocated_nbytes()
    cache._limit.max_bytes = held - 100  # many tokens at once leave no slot free: some bytes less
    with pytest.raises(ValueError, match="nothing was changed"):
        feed(model, cache, ids[:, : 70 + more], start=70)
    assert cache.allocated_nbytes() == held and cache.get_seq_length() == 70
    # What was free is garbage, and `tensors` leaves it out.
    assert state(cache) == kept
    cache._limit.max_bytes = 10**9
    got, wanted = (feed(model, each, ids, start=70) for each in (cache, free))
    assert torch.equal(got, wanted) and state(cache) == state(free)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("codec", ["int4", "mixed"])
def test_files_beams_and_moves_keep_all(policy, codec, tmp_path):
    model, ids = fold(tiny_model(), policy, codec=codec), random_ids(2, 100)
    cache, other = new_cache(model), new_cache(model)
    feed(model, cache, ids[:, :80])
    cache.save(tmp_path / "a.safetensors")
    other.load(tmp_path / "a.safetensors")
    assert state(other) == state(cache) and other.nbytes() == cache.nbytes()
    rows = torch.tensor([1, 1, 0])
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(rows)
    chosen.layers[0].offload()
    chosen.layers[0].prefetch()
    wanted = feed(model, cache, ids, start=80)
    assert torch.equal(feed(model, other, ids, start=80), wanted)
    got = feed(model, chosen, ids[rows], start=80)
    torch.testing.assert_close(got, wanted[rows], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"codec='{codec}', but this cache has codec='fp8'"):
        new_cache(model, codec="fp8").load(tmp_path / "a.safetensors")


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    model = fold(tiny_model(), TOVA(budget=50), codec="int4")
    cache = new_cache(model)
    feed(model, cache, random_ids(1, 80))
    good = cache.layers[0].tensors()
    narrow = good | {"packed_value": good["packed_value"][..., :-1]}
    monkeypatch.setattr(cache.layers[0], "tensors", lambda: narrow)
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="'packed_value' in rows of 19 bytes, but codec int4"):
        new_cache(model).load(tmp_path / "a.safetensors")
    short = good | {name: good[name][:, :, :9] for name in ("packed_key", "packed_value")}
    monkeypatch.setattr(cache.layers[0], "tensors", lambda: short)
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="goes to slot 50 of 9"):
        new_cache(model).load(tmp_path / "a.safetensors")


def test_unknown_codecs_are_refused_by_the_fold():
    with pytest.raises(ValueError, match="Did you mean 'int4'"):
        fold(tiny_model(), TOVA(cr=2.0), codec="int44")
