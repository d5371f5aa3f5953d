"""Random eviction: the same chance for every entry; heads, layers, queries and seeds draw apart.

Seeds are fixed, so that bounds of five standard deviations fail always or never.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cachefold import Random
from cachefold.core.eviction import Held, evict

ENTRIES = 10


def drawn(seeds: int = 1, layers: int = 1, queries: int = 1, heads: int = 1) -> torch.Tensor:
    """(seeds, layers, queries, heads), which of the same ENTRIES goes."""
    newest = torch.arange(ENTRIES, ENTRIES + queries).int()[:, None, None]
    found = []
    for seed in range(seeds):
        for layer in range(layers):
            position = torch.arange(ENTRIES).int().repeat(queries, heads, 1)
            held = Held(
                position=position, score=None, newest=newest, layer=layer,
                allowed=torch.full_like(newest, ENTRIES - 1),
            )  # fmt: skip
            found.append(evict(Random(budget=ENTRIES - 1, seed=seed), held, None))
    return torch.stack(found).view(seeds, layers, queries, heads)


def check_even(cells: torch.Tensor, count: int) -> None:
    """Chi-square of how often each of `count` cells was drawn, all alike likely."""
    expected = cells.numel() / count
    found = torch.bincount(cells.flatten(), minlength=count)
    spread = float(((found - expected) ** 2 / expected).sum())
    assert spread < count - 1 + 5 * math.sqrt(2 * (count - 1))


@pytest.mark.parametrize(
    ("over", "draws"), [("seeds", 1500), ("layers", 1500), ("queries", 40_000), ("heads", 40_000)]
)
def test_every_entry_goes_with_the_same_chance(over, draws):
    check_even(drawn(**{over: draws}), ENTRIES)


def test_what_goes_here_says_nothing_of_what_goes_elsewhere():
    """All pairs of entries are alike likely: two seeds, layers and heads, one query or the next."""
    draws = drawn(seeds=2, layers=2, queries=4001, heads=2).transpose(2, 3).flatten(0, 2)
    for one, other in itertools.combinations([*draws[:, 1:], *draws[:, :-1]], 2):
        check_even(one * ENTRIES + other, ENTRIES**2)


def test_a_token_stays_as_long_as_even_chances_let_it():
    """4000 heads read 40 tokens and keep 8: each eviction leaves a token with 8 chances in 9."""
    budget, tokens, heads = 8, 40, 4000
    position = torch.arange(budget + 1).int().repeat(1, heads, 1)
    policy, allowed = Random(budget=budget), torch.full((1, 1, 1), budget)
    for newest in range(budget, tokens):
        at = torch.full((1, 1, 1), newest).int()
        held = Held(position=position, score=None, newest=at, allowed=allowed, layer=0)
        victim = evict(policy, held, None)
        if newest + 1 < tokens:
            position.scatter_(-1, victim, newest + 1)
    found = torch.bincount(position[position >= 0], minlength=tokens) / heads
    evictions = tokens - torch.arange(tokens).clamp(min=budget)
    chance = (budget / (budget + 1)) ** evictions
    assert ((found - chance).abs() < 5 * (chance * (1 - chance) / heads).sqrt()).all()
