"""Held-out loss sees folding."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from cachefold import DMC, fold
from cachefold.evaluation.perplexity import heldout_loss
from tests.models.tiny import scramble_decisions, tiny_model


class _Characters:
    eos_token_id = 2

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(c) % 60 for c in text]}


def _text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog. " * 8}))
    return path


def test_a_fresh_fold_costs_nothing_and_merging_is_seen(tmp_path):
    model, file = fold(tiny_model(), DMC(delay=2)), _text_file(tmp_path)
    (fresh,) = heldout_loss(model, _Characters(), [file], pieces=3, tokens=64)
    assert (fresh.pieces, fresh.cr, fresh.increase) == (3, 1.0, 0.0)
    scramble_decisions(model)
    (merged,) = heldout_loss(model, _Characters(), [file], pieces=3, tokens=64)
    assert merged.increase_error > 0 == fresh.increase_error
    assert merged.cr > 1.1 and merged.folded_loss != merged.dense_loss == fresh.dense_loss


def test_the_loss_is_the_usual_cross_entropy(tmp_path):
    model, file = tiny_model(), _text_file(tmp_path)
    ids = torch.tensor([_Characters()(json.loads(file.read_text())["text"])["input_ids"][:64]])
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits[0], ids[0, 1:]).item()
    (result,) = heldout_loss(fold(model, DMC()), _Characters(), [file], pieces=1, tokens=64)
    assert result.dense_loss == pytest.approx(expected, abs=1e-5)


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not folded"):
        heldout_loss(tiny_model(), _Characters(), [_text_file(tmp_path)])


def test_trained_weights_are_compared_with_the_base_given(tmp_path):
    trained, file = fold(tiny_model(), DMC()), _text_file(tmp_path)
    for parameter in trained.model.layers.parameters():
        parameter.data *= 1.5
    (result,) = heldout_loss(trained, _Characters(), [file], pieces=1, tokens=64, base=tiny_model())
    (fresh,) = heldout_loss(fold(tiny_model(), DMC()), _Characters(), [file], pieces=1, tokens=64)
    assert result.dense_loss == fresh.dense_loss != result.folded_loss
