"""The ring of newest tokens as a circular buffer, for steps of one token that change it in place.

Elsewhere a ring is in order, the oldest token first, and may hold fewer tokens than the delay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.cache.stream import concatenate
from cachefold.core.tokens import Tokens, token_dim

STEPS_AHEAD = 8
"""Steps that get their pages at once: each look ahead makes the host wait for the device."""


def blank(like: Tokens, count: int) -> Tokens:
    """`count` tokens that are not valid, in the shapes and dtypes of `like`.

    >>> one = torch.ones(1, 1, 1)
    >>> token = Tokens(one[..., None], one[..., None], one, one, one, one, one[0] > 0)
    >>> blank(token, 2).valid.tolist(), blank(token, 2).omega.tolist()
    ([[False, False]], [[[1.0, 1.0]]])
    """

    def filled(name: str, tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        shape[token_dim(name)] = count
        # The mean of an entry is a sum over its weight: a weight of 0 would make it NaN.
        return tensor.new_full(shape, name in ("omega", "size"))

    return like.map(filled)


def to_step(ring: Tokens | None, tail: Tokens | None, delay: int) -> tuple[Tokens, Tokens]:
    """Copies of ring and open entry as a step takes them: `delay` tokens, one entry.

    What is missing is not valid, which equals padding on the left. At least one of both is there.
    """
    some = ring if ring is not None else tail
    assert some is not None
    vectors = some.key.dtype
    wide = torch.float64 if vectors == torch.float64 else torch.float32
    if ring is None:
        assert tail is not None
        ring = blank(tail, 0)
    missing = blank(ring, delay - ring.valid.shape[1])
    whole = concatenate([missing, ring])
    opened = blank(ring, 1) if tail is None else tail.slice(0, 1)
    summed = ("key", "value", "omega", "size")
    return (
        whole.map(lambda name, x: x.to(wide) if name in ("alpha", "omega", "size") else x),
        opened.map(lambda name, x: x.to(wide) if name in summed else x),
    )


def leaving_order(turn: Tensor, delay: int, count: int) -> Tensor:
    """(count,) int64, where the tokens are that leave a circular ring next.

    >>> leaving_order(torch.tensor(2), 3, 3).tolist()
    [2, 0, 1]
    """
    return (turn + torch.arange(count, device=turn.device)) % delay


def in_order(ring: Tokens, turn: Tensor) -> Tokens | None:
    """A copy of a circular ring with the oldest token first; None of an empty one."""
    width = ring.valid.shape[1]
    return picked(ring, leaving_order(turn, width, width)) if width else None


def picked(ring: Tokens, order: Tensor) -> Tokens:
    """Copies the tokens at `order` (n,) int64."""
    return ring.map(lambda name, tensor: tensor.index_select(token_dim(name), order))


def closings(ring: Tokens, tail: Tokens, turn: Tensor, count: int) -> Tensor:
    """Most entries that each head closes in the next `count` steps, (B, K) int64.

    Args:
        ring: circular; its tokens have decided. When it is empty, `count` is 1.
        tail: the open entry.
        turn: () int64, where the oldest token of the ring is.
        count: steps, not more than tokens in the ring.
    """
    width = ring.valid.shape[1]
    if not width:
        return tail.valid.expand(-1, tail.key.shape[1]).long()
    order = leaving_order(turn, width, count)
    valid = ring.valid.index_select(1, order)
    before = torch.cat([tail.valid, valid[:, :-1]], 1)
    merges = (ring.alpha.index_select(2, order) > 0.5) & (valid & before)[:, None]
    return (before[:, None] & ~merges).sum(-1)
