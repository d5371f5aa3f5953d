"""Eviction without training, query by query: what stays after each token is a matter of ranks.

A token is added, its query attends to all entries held, itself included; then the entries that
rank lowest are evicted until no more are left than allowed.

Legend: B batch, H query heads, K kv heads, G = H / K, T tokens, Q queries, S slots for entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

FREE = -1
"""Position of a slot that holds no entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The entries of a layer while one of its queries is dealt with."""

    position: Tensor
    """(B, K, S) int32, number of the entry's token in its text, padding left out; or `FREE`."""
    score: Tensor | None
    """(B, K, S) float32, what the evictor's `score` made of the query; None where it has none."""
    newest: Tensor
    """(B, 1, 1) int32, position of the query."""
    allowed: Tensor
    """(B, 1, 1) int64, entries that may stay."""
    layer: int
    """Index of the layer."""


class Evictor(Protocol):
    """What decides about evictions; the same for prefill, scoring and decoding."""

    attentive: ClassVar[bool]
    """Whether ranks depend on attention; otherwise `score` is never called."""
    cumulative: ClassVar[bool]
    """Whether scores go on from query to query, and are kept beside the entries."""

    @property
    def budget(self) -> int | None:
        """Most entries that are ever allowed; None = that grows with the text."""
        ...

    def allowed(self, seen: Tensor) -> Tensor:
        """Entries that each head may keep; rises by at most 1 from token to token.

        Args:
            seen: int64, any shape, tokens seen, padding left out.

        Returns:
            int64, same shape.
        """
        ...

    def score(self, score: Tensor | None, weights: Tensor) -> Tensor:
        """Scores from the attention of one query.

        Args:
            score: (B, K, S) float32, after the query before, 0 for an entry that is new; None
                where scores don't go on.
            weights: (B, K, G, S) float32, attention of the query, 0 where no entry is.

        Returns:
            (B, K, S) float32.
        """
        ...

    def rank(self, held: Held) -> Tensor:
        """Who goes first: the lowest, of equal ones the oldest.

        Returns:
            (B, K, S) of any floating type, inf for entries that must stay; anything at free slots.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Name and options: what a saved cache and the one it is read into must agree on."""
        ...


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What new tokens bring, known before any attention; on the CPU."""

    position: Tensor
    """(B, T) int32, `FREE` at padding."""
    allowed: Tensor
    """(B, T) int64, entries that may stay after the token."""
    evicts: Tensor
    """(B, T) bool, one entry of every head goes after the token."""
    seen: Tensor
    """(B,) int64, tokens seen after all of them, padding left out."""

    def narrow(self, start: int, stop: int) -> Arrivals:
        """The tokens [start, stop); `seen` stays that after all."""
        position, allowed, evicts = (
            part[:, start:stop] for part in (self.position, self.allowed, self.evicts)
        )
        return Arrivals(position, allowed, evicts, self.seen)


def held_count(evictor: Evictor, seen: Tensor) -> Tensor:
    """Entries that each head holds after `seen` (any shape) tokens, int64."""
    return torch.minimum(seen, evictor.allowed(seen))


def arrivals(evictor: Evictor, seen: Tensor, valid: Tensor) -> Arrivals:
    """What T new tokens bring.

    Args:
        evictor: decides.
        seen: (B,) int64 on the CPU, tokens seen before, padding left out.
        valid: (B, T) bool on the CPU, False at padding.
    """
    after = seen[:, None] + valid.cumsum(1)
    allowed = evictor.allowed(after)
    before = held_count(evictor, after - 1)
    return Arrivals(
        position=torch.where(valid, after - 1, FREE).int(),
        allowed=allowed,
        evicts=valid & (before + 1 > allowed),
        seen=after[:, -1].clone(),  # kept, and a view would keep the counts of all new tokens
    )


def attend(scores: Tensor, position: Tensor) -> Tensor:
    """Attention weights over the entries that exist.

    Args:
        scores: (B, K, G, ..., S), anything, NaN included, at free slots.
        position: (B, K, ..., S) int32, `FREE` at free slots.

    Returns:
        (B, K, G, ..., S); 0 at free slots, unless all are free.

    >>> nan = float("nan")
    >>> attend(torch.tensor([[[[1.0, nan]]]]), torch.tensor([[[7, FREE]]])).tolist()
    [[[[1.0, 0.0]]]]
    """
    hidden = (position < 0).unsqueeze(2)
    return torch.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), -1)


def evict(evictor: Evictor, held: Held, evicts: Tensor | None) -> Tensor:
    """Frees one slot of every head; changes `held.position` in place.

    Args:
        evictor: decides.
        held: B requests, K heads.
        evicts: (B, 1, 1) bool, requests that evict; None = all.

    Returns:
        (B, K, 1) int64, the slots; anything for a request that doesn't evict.
    """
    position = held.position
    rank = evictor.rank(held).masked_fill(position < 0, torch.inf)
    others = rank != rank.amin(-1, keepdim=True)
    victim = position.masked_fill(others, torch.iinfo(position.dtype).max).argmin(-1, keepdim=True)
    if evicts is None:
        position.scatter_(-1, victim, FREE)
    else:
        position.scatter_(-1, victim, torch.where(evicts, FREE, position.gather(-1, victim)))
    return victim
