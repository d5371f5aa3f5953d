"""Padding read from masks, packed rows refused; examples of all models modules."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import cachefold.models
from cachefold.models.masks import valid_tokens

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


def test_packed_rows_are_refused():
    text = torch.tensor([0, 0, 1, 1])
    mask = (_causal(torch.ones(1, 4, dtype=torch.bool))) & (text[:, None] == text)
    for packed in (mask, torch.where(mask, 0.0, -1e9)):
        with pytest.raises(ValueError, match="a row of its own"):
            valid_tokens(packed, 1, 4, CPU)


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
