"""Every family against its dense model, where the folded formulas do all the work.

A text that comes whole and of which nothing merges is given to the original attention; pieces that
go on with a cache, `append` and policies that evict never are.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cachefold import DMC, TOVA, FoldRun, fold
from cachefold.models.fold import folded_layers
from tests.models.tiny import FAMILIES, random_ids, sharp_model

TOKENS = 40
EDGES = [0, 11, 12, 20, *range(21, TOKENS + 1)]
PIECEWISE = {"dmc": DMC(delay=3), "tova": TOVA(budget=1000)}


def _close(actual: Tensor, dense: Tensor) -> None:
    torch.testing.assert_close(actual, dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _dense(family: str) -> Tensor:
    return sharp_model(family)(random_ids(2, TOKENS), use_cache=False).logits


@torch.no_grad()
def _in_pieces(model) -> Tensor:
    """Logits of chunks and of single tokens, each after a cache of what came before."""
    ids, cache, logits = random_ids(2, TOKENS), None, []
    for start, stop in itertools.pairwise(EDGES):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert cache.compression_ratio() == 1
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_pieces_through_a_cache_that_keeps_all_is_dense(family, name):
    model = fold(sharp_model(family), PIECEWISE[name])
    _close(_in_pieces(model), _dense(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_as_a_whole_with_nothing_merged_is_dense(family):
    model = fold(sharp_model(family), DMC(delay=3))
    with torch.no_grad():
        run = FoldRun(mode="append")
        _close(model(random_ids(2, TOKENS), use_cache=False, fold_run=run).logits, _dense(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_compared_attend_sharply(family):
    """With scores nearly equal, wrong ones would give the same logits."""
    model = sharp_model(family)
    model.set_attn_implementation("eager")  # the one that returns weights
    out = model(random_ids(2, TOKENS), use_cache=False, output_attentions=True)
    for layer in folded_layers(fold(model, DMC())):
        last = out.attentions[layer][:, :, -1]
        assert last.max(-1).values.mean() > 2 / TOKENS
