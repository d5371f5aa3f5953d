"""A model takes only caches that were made for its policy and its layers."""

from __future__ import annotations

import pytest

from cachefold import DMC, TOVA, FoldedCache, fold
from cachefold.models.fold import new_cache
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

MADE = {"folded_layers": [0, 1], "delay": 2, "window": 4}


def _folded(**options):
    model = fold(tiny_model(), DMC(**({"delay": 2, "window": 4} | options)))
    scramble_decisions(model)
    return model


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"delay": 3}, "delay=3, but .*delay=2"),
        ({"window": None}, "window=None, but .*window=4"),
        ({"kv_heads": 1}, "kv_heads=1, but .*kv_heads=None"),
        ({"proportional": True}, "proportional=True, but .*proportional=False"),
        ({"folded_layers": [0]}, r"folded_layers=\[0\], but .*folded_layers=\[0, 1\]"),
    ],
)
def test_a_cache_of_other_options_is_refused_and_stays_empty(changes, named):
    model, ids = _folded(), random_ids(2, 24)
    cache = FoldedCache(model.config, **(MADE | changes))
    with pytest.raises(ValueError, match=f"made with {named}.*new_cache"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=FoldedCache(model.config, **MADE))


def test_pooled_heads_and_sizes_are_told_from_the_side_of_the_model_too():
    for name, value in (("kv_heads", 1), ("proportional", True)):
        model = _folded(window=None, **{name: value})
        with pytest.raises(ValueError, match=f"folded with {name}={value}"):
            cache = FoldedCache(model.config, [0, 1], delay=2)
            model(random_ids(2, 24), past_key_values=cache)
        model(random_ids(2, 24), past_key_values=new_cache(model))


def test_a_cache_of_another_way_to_compress_is_refused():
    model, ids = _folded(), random_ids(2, 24)
    evicting = fold(tiny_model(), TOVA(budget=8))
    for one, other in ((model, evicting), (evicting, model)):
        with pytest.raises(ValueError, match="this cache was made for"):
            one(ids, past_key_values=new_cache(other))
    missing = FoldedCache(evicting.config, [1], evictor=TOVA(budget=8))
    with pytest.raises(ValueError, match=r"folded_layers=\[1\]"):
        evicting(ids, past_key_values=missing)
