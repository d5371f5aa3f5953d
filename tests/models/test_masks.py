"""Padding read from masks, packed rows refused; examples of all models modules."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import cachefold.models
from cachefold import DMC, TOVA, fold
from cachefold.models import masks
from cachefold.models.masks import valid_tokens
from tests.models.tiny import random_ids, tiny_model

CPU = torch.device("cpu")
VALID = torch.tensor([[False, False, True, True], [True, True, True, False]])


def _causal(valid):
    return torch.ones(4, 4, dtype=torch.bool).tril() & valid[:, None, None, :]


@pytest.mark.parametrize("kind", ["rows", "bool", "float"])
def test_left_and_right_padding(kind):
    mask = VALID.long() if kind == "rows" else _causal(VALID)
    if kind == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(valid_tokens(mask, 2, 4, CPU), VALID)
    # A longer past only adds columns on the left.
    longer = torch.cat([mask[..., :1], mask], -1)
    assert torch.equal(valid_tokens(longer, 2, 4, CPU), VALID)


def test_no_mask_means_no_padding():
    assert valid_tokens(None, 2, 4, CPU).all()


def _prefix(mask):
    mask[:, :, :2, -4:-2] = True


def _hole(mask):
    mask[:, :, 2, -4] = False


def _hole_before(mask):
    mask[:, :, 1, -4] = False


def _blind(mask):
    mask[:, :, 1, -3] = False


@pytest.mark.parametrize("rows", [1, 3, 1024])
@pytest.mark.parametrize("change", [_prefix, _hole, _hole_before, _blind])
@pytest.mark.parametrize("past", [0, 1])
def test_masks_that_say_more_than_what_is_padding_are_refused(change, past, rows, monkeypatch):
    monkeypatch.setattr("cachefold.models.masks.ROWS", rows)
    mask = _causal(torch.ones(2, 4, dtype=torch.bool))
    mask = torch.cat([mask[..., :past] | True, mask], -1)
    assert valid_tokens(mask, 2, 4, CPU).all()
    change(mask)
    for kind in (mask, torch.where(mask, 0.0, -torch.inf)):
        with pytest.raises(ValueError, match="says more than which tokens are padding"):
            valid_tokens(kind, 2, 4, CPU)


def test_a_hole_in_the_past_a_bias_and_other_shapes_are_refused():
    mask = _causal(VALID)
    past = torch.cat([mask[..., :1] | True, mask], -1)
    past[:, :, 2, 0] = False
    bias = torch.where(mask, 0.0, -torch.inf)
    bias[:, :, 3, 2] = -0.5
    of_heads, one_row = mask.expand(-1, 2, -1, -1), VALID[:, None, None]
    for odd in (past, bias, of_heads, one_row, mask[..., 1:]):
        with pytest.raises(ValueError, match="no other mask"):
            valid_tokens(odd, 2, 4, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [-1e4, -torch.inf])
def test_additive_masks_hide_by_any_large_number(dtype, hidden):
    mask = torch.where(_causal(VALID), 0.0, hidden).to(dtype)
    assert torch.equal(valid_tokens(mask, 2, 4, CPU), VALID)
    assert torch.equal(valid_tokens(mask[:, :, 2:3, :3], 2, 1, CPU), VALID[:, 2:3])


def test_packed_rows_are_refused():
    text = torch.tensor([0, 0, 1, 1])
    mask = (_causal(torch.ones(1, 4, dtype=torch.bool))) & (text[:, None] == text)
    for packed in (mask, torch.where(mask, 0.0, -1e9)):
        with pytest.raises(ValueError, match="a row of its own"):
            valid_tokens(packed, 1, 4, CPU)


@pytest.mark.parametrize("policy", [DMC(delay=2), TOVA(budget=6)])
def test_one_layer_looks_at_all_of_a_mask(policy, monkeypatch):
    looked, whole = [], masks._says_only_padding
    monkeypatch.setattr(masks, "_says_only_padding", lambda *a: looked.append(1) or whole(*a))
    model, ids = fold(tiny_model(), policy), random_ids(2, 8)
    padding = torch.ones_like(ids)
    padding[1, :3] = 0
    model(ids, attention_mask=padding)
    assert len(looked) == 1 < model.config.num_hidden_layers
    prefix = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="a row of its own"):
        model(ids, attention_mask=prefix)


def test_other_masks_are_refused():
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        valid_tokens(torch.ones(2, 4, 4), 2, 4, CPU)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(cachefold.models.__path__)])
def test_examples_run(name):
    assert not doctest.testmod(importlib.import_module(f"cachefold.models.{name}")).failed


def test_public_functions_have_examples():
    from cachefold import fold, folded, is_folded, load_folded, save_folded, unfold

    for function in (fold, folded, is_folded, load_folded, save_folded, unfold):
        assert ">>>" in function.__doc__
