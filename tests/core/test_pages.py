"""The layout of a page, and what is read out of it."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

from cachefold.core.pages import gather, key_view, slots, value_view
from cachefold.core.tokens import Tokens, token_dim


@pytest.mark.parametrize("page_size", [16, 32])
def test_what_is_written_to_pages_is_gathered_in_order(page_size):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[page_size + 3, 0], [1, 2 * page_size]])
    table = torch.tensor([[[4, 1], [-1, -1]], [[0, -1], [2, 3]]], dtype=torch.int32)
    pages = torch.full((5, page_size * (3 + 2)), math.nan)
    want = {}
    for b in range(2):
        for k in range(2):
            for slot in range(int(lengths[b, k])):
                page, row = table[b, k, slot // page_size], slot % page_size
                key, value = torch.rand(3, generator=generator), torch.rand(2, generator=generator)
                key_view(pages, page_size, 3)[page, :, row] = key
                value_view(pages, page_size, 3)[page, row] = value
                want[b, k, slot] = (key, value)
    key, value = gather(pages, page_size, 3, table)
    mask = slots(lengths, 2, page_size)
    assert mask.nonzero().tolist() == [list(place) for place in sorted(want)]
    for place, (one_key, one_value) in want.items():
        assert torch.equal(key[place], one_key) and torch.equal(value[place], one_value)


def test_keys_lie_channel_by_channel_and_values_entry_by_entry():
    pages = torch.arange(2.0 * 16 * 5).view(2, 80)
    assert key_view(pages, 16, 3)[1, 2].tolist() == list(range(80 + 32, 80 + 48))
    assert value_view(pages, 16, 3)[1, 2].tolist() == [80 + 48 + 4, 80 + 48 + 5]


def run(tokens: int) -> Tokens:
    vector, angle = torch.rand(2, 3, tokens, 4), torch.rand(2, tokens, 2)
    return Tokens(
        vector, vector + 1, angle, angle + 1, vector[..., 0], vector[..., 1], angle[..., 0] > 0.5
    )


def test_a_part_of_a_run_is_a_view_or_a_copy():
    whole = run(9)
    view, copied = whole.narrow(2, 5), whole.slice(2, 5)
    names = ("key", "value", "cos", "sin", "alpha", "omega", "valid")
    for name, held, part, own in zip(
        names, whole.tensors(), view.tensors(), copied.tensors(), strict=True
    ):
        assert held is getattr(whole, name) and part.shape[token_dim(name)] == 3
        assert torch.equal(part, held.narrow(token_dim(name), 2, 3)) and torch.equal(part, own)
        assert part.data_ptr() == held.data_ptr() + 2 * held.stride(token_dim(name)) * held.itemsize
        assert own.untyped_storage().nbytes() == own.numel() * own.itemsize


@pytest.mark.parametrize("name", ["pages", "tokens"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.core.{name}"))
    assert result.attempted and not result.failed
