"""The attention mixin of a layer that evicts: project, attend, evict.

Legend: B batch, H query heads, K kv heads, G = H / K, T tokens, Q queries of a block, S entries,
N = S + Q, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.attention.call import capped
from cachefold.cache.evicting import EvictingLayer
from cachefold.cache.slots import Sight
from cachefold.core.eviction import FREE, Arrivals, Evictor, Held, attend, evict
from cachefold.core.rotary import rotate
from cachefold.models import families
from cachefold.models.caches import check_goes_on, layer_of
from cachefold.models.masks import valid_tokens
from cachefold.models.run import FoldRun, check_evicting_run, check_options
from cachefold.policies.budget import BudgetPolicy

BLOCK = 128
"""Queries that get their scores at once: more make larger products and more scores unused."""


class EvictingAttention:
    """Mixin put before a family's attention class; adds no parameters."""

    policy: BudgetPolicy

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        fold_run: FoldRun | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's forward, over the entries that the policy keeps."""
        if fold_run is not None:
            check_evicting_run(self.policy.name, fold_run)
            check_goes_on(fold_run.mode, past_key_values)
        if fold_run is not None and fold_run.mode == "dense":
            return super().forward(
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        check_options(kwargs)
        layer = layer_of(past_key_values, self.policy, self.layer_idx)
        layer = EvictingLayer(self.policy, self.layer_idx) if layer is None else layer
        assert position_embeddings is not None
        batch, count = hidden_states.shape[:2]
        valid = None
        if attention_mask is not None:
            valid = valid_tokens(
                attention_mask, batch, count, hidden_states.device, check=self.checks_mask
            )
        query, key, value = families.project(self, hidden_states)
        query, key = (rotate(x, *position_embeddings) for x in (query, key))
        if valid is not None:  # whatever stands at padding, NaN included, must not reach a sum
            key, value = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (key, value))
        run = _step if count == 1 and layer.get_seq_length() else _blocks
        with layer.growing():
            new = layer.arrive(key, value, valid)
            maths = Maths(self.scaling, families.softcap(self))
            out = run(layer, query, key, value, new, maths)
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1)), None


class Maths:
    """Scores and weighted sums of grouped query heads.

    Args:
        scaling: factor on the scores.
        softcap: tanh cap on the scores (Gemma 2), or None.
    """

    def __init__(self, scaling: float, softcap: float | None) -> None:
        self.scaling, self.softcap = scaling, softcap

    def scores(self, query: Tensor, sight: Sight) -> Tensor:
        """(B, H, Q, D) queries and the entries they see -> (B, K, G, Q, N)."""
        scores = self._products(query, sight.key)
        if sight.packed is None:
            return scores
        key, _, old = sight.packed
        return torch.where(old, self._products(query, key), scores)

    def _products(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, Q, D) queries and (B, K, N, D) keys -> (B, K, G, Q, N)."""
        (batch, heads, count, dim), kv_heads = query.shape, key.shape[1]
        rows = query.reshape(batch, kv_heads, -1, dim) * self.scaling
        scores = capped(rows @ key.transpose(2, 3), self.softcap)
        return scores.view(batch, kv_heads, heads // kv_heads, count, -1)

    def sums(self, weights: Tensor, sight: Sight) -> Tensor:
        """(B, K, G, Q, N) weights and the entries seen -> (B, H, Q, Dv)."""
        if sight.packed is None:
            return self._sums(weights, sight.value)
        _, value, old = sight.packed
        exact = self._sums(weights.masked_fill(old, 0.0), sight.value)
        return exact + self._sums(weights.masked_fill(~old, 0.0), value)

    def _sums(self, weights: Tensor, value: Tensor) -> Tensor:
        batch, kv_heads, group, count, width = weights.shape
        rows = weights.reshape(batch, kv_heads, group * count, width).to(value.dtype) @ value
        return rows.view(batch, kv_heads * group, count, -1)


def _step(
    layer: EvictingLayer, query: Tensor, key: Tensor, value: Tensor, new: Arrivals, maths: Maths
) -> Tensor:
    """One token after a cache; without a codec it copies only its own keys and values.

    Returns:
        (B, H, 1, Dv).
    """
    layer.add(key, value, new)
    sight = Sight(*layer.read())
    assert layer.position is not None
    weights = attend(maths.scores(query, sight), layer.position[:, :, None])
    book = Book(layer, layer.position, layer.score)
    victim = book.account(weights[:, :, :, 0], new, 0)
    layer.position, layer.score = book.position, book.score
    layer.vacate(victim, new)
    return maths.sums(weights, sight)


def _blocks(
    layer: EvictingLayer, query: Tensor, key: Tensor, value: Tensor, new: Arrivals, maths: Maths
) -> Tensor:
    """Any number of tokens, block by block; (B, H, T, Dv)."""
    held, slots = layer.columns(new), layer.slots
    assert layer.position is not None and slots is not None
    book, out = Book(layer, layer.position, layer.score), []
    for start in range(0, query.shape[2], BLOCK):
        part = slice(start, start + BLOCK)
        come = slots.arriving(key[:, :, part], value[:, :, part])
        held = tuple(torch.cat(both, 2) for both in zip(held, come, strict=True))
        some = new.narrow(start, start + BLOCK)
        arrived = some.position.to(query.device)[:, None]
        position = torch.cat([book.position, arrived.expand(-1, key.shape[1], -1)], 2)
        sight = slots.sight(held, position, arrived)
        weights = book.block(maths.scores(query[:, :, part], sight), some)
        out.append(maths.sums(weights, sight))
        order = book.compact()
        if order is not None:
            held = tuple(_picked(x, order) for x in held)
    layer.fill(held, book.position, book.score)
    return torch.cat(out, 2)


class Book:
    """Positions and scores of the entries of a layer while queries go by.

    Args:
        layer: whose entries; not changed.
        position: (B, K, S) int32; not changed.
        score: (B, K, S) float32, of cumulative policies.
    """

    def __init__(self, layer: EvictingLayer, position: Tensor, score: Tensor | None) -> None:
        self.evictor: Evictor = layer.evictor
        self.layer = layer
        self.position = position
        self.score = score

    def account(self, weights: Tensor | None, new: Arrivals, query: int) -> Tensor | None:
        """Scores one query, evicts after it: returns the slots (B, K, 1) freed, None if none was.

        Args:
            weights: (B, K, G, S) attention of the query; None for policies that don't read it.
            new: the tokens that come.
            query: index of the token among them.
        """
        evicts = new.evicts[:, query]
        due = bool(evicts.any())
        score = self.score
        if self.evictor.attentive and (due or self.evictor.cumulative):
            assert weights is not None
            weights = weights.detach()
            real = new.position[:, query] >= 0
            if not bool(real.all()):
                unreal = ~real.to(weights.device)[:, None, None, None]
                weights = weights.masked_fill(unreal, 0.0)  # not times 0: padding may be NaN
            score = self.evictor.score(score, weights)
            self.score = score if self.evictor.cumulative else None
        if not due:
            return None
        device, some = self.position.device, (slice(None), None, None)
        held = Held(
            position=self.position, score=score, layer=self.layer.index,
            newest=new.position[:, query].to(device)[some],
            allowed=new.allowed[:, query].to(device)[some],
        )  # fmt: skip
        return evict(self.evictor, held, None if bool(evicts.all()) else evicts.to(device)[some])

    def block(self, scores: Tensor, new: Arrivals) -> Tensor:
        """Attention weights (B, K, G, Q, N) of Q queries, whose tokens are the last of N slots."""
        count, width = scores.shape[-2:]
        before = width - count
        self.position = F.pad(self.position, (0, count), value=FREE)
        self.score = None if self.score is None else F.pad(self.score, (0, count))
        arrived = new.position.to(scores.device)
        rows = []
        for i in range(count):
            self.position[:, :, before + i] = arrived[:, i, None]
            row = None
            if self.evictor.attentive:
                row = attend(scores[..., i, :], self.position)
            rows.append(self.position.clone() if row is None else row)
            self.account(row, new, i)
        if self.evictor.attentive:
            return torch.stack(rows, 3)
        return attend(scores, torch.stack(rows, 2))

    def compact(self) -> Tensor | None:
        """Drops free slots; returns those that stay, oldest first, (B, K, S), None = all."""
        held = self.position >= 0
        if bool(held.all()):
            return None
        count = int(held.sum(-1).max())
        last = torch.iinfo(self.position.dtype).max
        order = self.position.masked_fill(~held, last).argsort(-1)[..., :count]
        self.position = self.position.gather(-1, order)
        if self.score is not None:
            self.score = self.score.gather(-1, order)
        return order


def _picked(x: Tensor, order: Tensor) -> Tensor:
    """The entries (B, K, S, D) at `order` (B, K, n)."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))
