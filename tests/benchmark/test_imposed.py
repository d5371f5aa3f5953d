"""Whole models keep the imposed ratio, and nothing stays behind on them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cachefold import DMC, fold
from cachefold.benchmark import imposed
from cachefold.benchmark.models import folded_logits, make_pair
from cachefold.benchmark.synthetic import Shape
from cachefold.models import families
from cachefold.models.fold import is_folded, new_cache, unfold
from tests.models.tiny import random_ids, tiny_model


def _decisions(model):
    return [layer.decision for layer in families.attention_layers(model)]


def _prefill(pair, cr, tokens=160, more=8, seed=0):
    lengths = imposed.layer_lengths(pair.folded, pair.shape, 2, tokens, cr, seed)
    imposition = imposed.Imposition(pair.folded, lengths, tokens, more, cr, seed)
    cache = new_cache(pair.folded, backend="reference")
    with torch.no_grad(), imposition.active():
        pair.folded(random_ids(2, tokens), past_key_values=cache)
    return cache, imposition, lengths


@pytest.mark.parametrize("cr", [1.0, 2.0, 5.0])
def test_prefill_keeps_the_ratio(pair, cr):
    cache, imposition, lengths = _prefill(pair, cr)
    assert cache.compression_ratio() == pytest.approx(cr, rel=0.01)
    for kept, closed in zip(cache.entries(), lengths, strict=True):
        assert kept.equal(closed + pair.shape.delay + 1)
    assert not lengths[0].equal(lengths[1]) or cr == 1.0


def test_decisions_go_back_when_it_fails(pair):
    before = _decisions(pair.folded)
    _, imposition, _ = _prefill(pair, 2.0)
    with pytest.raises(RuntimeError), imposition.active():
        assert _decisions(pair.folded) != before
        raise RuntimeError
    assert _decisions(pair.folded) == before


def test_restart_decides_the_same_again(pair):
    cache, imposition, _ = _prefill(pair, 3.0)
    imposition.restart()
    again = new_cache(pair.folded, backend="reference")
    with torch.no_grad(), imposition.active():
        pair.folded(random_ids(2, 160), past_key_values=again)
    for one, other in zip(cache.entries(), again.entries(), strict=True):
        assert one.equal(other)


def test_decisions_run_out_loudly(pair):
    cache, imposition, _ = _prefill(pair, 2.0, more=1)
    with torch.no_grad(), imposition.active(), pytest.raises(AssertionError, match="more tokens"):
        for _ in range(2):
            pair.folded(random_ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("proportional", [False, True])
def test_filled_cache(family, proportional):
    pair = make_pair(tiny_model(family), "float32")
    if proportional:
        fold(unfold(pair.folded), DMC(proportional=True))
    shape = Shape.of(pair.folded.config)
    cache, imposition = imposed.filled_cache(
        pair.folded, shape, 2, 200, 4.0, more=6, backend="reference"
    )
    assert cache.get_seq_length() == 200
    assert cache.compression_ratio() == pytest.approx(4.0, rel=0.01)
    lengths = imposed.layer_lengths(pair.folded, shape, 2, 200, 4.0, 0)
    for kept, closed in zip(cache.entries(), lengths, strict=True):
        assert kept.equal(closed + 17)
    with torch.no_grad(), imposition.active():
        for _ in range(6):
            logits = pair.folded(random_ids(2, 1), past_key_values=cache).logits
            assert logits.isfinite().all()
    assert cache.get_seq_length() == 206
    assert [layer.get_seq_length() for layer in cache.layers] == [206] * len(cache.layers)


def test_dense_caches_are_filled(pair):
    cache = DynamicCache(config=pair.dense.config)
    imposed.fill_dense(cache, pair.dense, pair.shape, 2, 50, seed=0)
    assert cache.get_seq_length() == 50
    assert cache.layers[1].keys.std() == pytest.approx(1.0, rel=0.1)
    with torch.no_grad():
        pair.dense(random_ids(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 51


def test_twin_stays_dense_and_is_the_same_model():
    model = tiny_model()
    ids = random_ids(2, 20)
    with torch.no_grad():
        wanted = model(ids).logits
    pair = make_pair(model, "float32")
    assert is_folded(pair.folded) and not is_folded(pair.dense)
    with torch.no_grad():
        assert pair.dense(ids).logits.equal(wanted)
    weights = zip(pair.dense.parameters(), tiny_model().parameters(), strict=True)
    assert all(one.equal(other) for one, other in weights)
    own = {p.data_ptr() for p in pair.folded.parameters()}
    assert {p.data_ptr() for p in pair.dense.parameters()} <= own


def test_folded_logits_depend_on_the_ratio(pair):
    one, two, again = (folded_logits(pair, "reference", cr, 0) for cr in (1.0, 2.0, 2.0))
    assert one.shape == (2, 5, 64) and two.equal(again) and not torch.allclose(one, two)
