"""From runs of tokens to what new tokens may attend to.

Legend: B batch, K kv heads, N tokens, T new tokens, D key dim, Dv value dim, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cachefold.core.tokens import Tokens, token_dim


def without_padding(new: Tokens) -> Tokens:
    """The same tokens with zeros for keys and values at padding, and weights of 1.

    Whatever stands at padding, NaN included, must not reach a sum.

    >>> nan = torch.full((1, 1, 1, 1), torch.nan)
    >>> token = Tokens(nan, nan, nan[0], nan[0], nan[0], nan[0], torch.tensor([[False]]))
    >>> without_padding(token).key.item()
    0.0
    """
    padding = ~new.valid[:, None, :]
    return replace(
        new,
        key=new.key.masked_fill(padding[..., None], 0.0),
        value=new.value.masked_fill(padding[..., None], 0.0),
        omega=new.omega.masked_fill(padding, 1.0),
    )


def clean(new: Tokens) -> Tokens:
    """New tokens as the stream holds them: no NaN of padding, whole batch, wide weights."""
    batch, new = new.key.shape[0], without_padding(new)
    return replace(
        new,
        cos=new.cos.expand(batch, -1, -1),
        sin=new.sin.expand(batch, -1, -1),
        omega=new.omega if new.omega.dtype == torch.float64 else new.omega.float(),
    )


def concatenate(parts: list[Tokens]) -> Tokens:
    """Joins runs; a type wider than the others (sums in float32) wins."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        *(
            torch.cat([getattr(part, field.name) for part in parts], token_dim(field.name))
            for field in fields(Tokens)
        )
    )


def arrivals_that_close(tokens: Tokens, num_prefix: int) -> Tensor:
    """(B, K, N) bool, True where the arrival of a token closes the entry before it.

    Args:
        tokens: alpha 0 where nothing can be merged into.
        num_prefix: leading tokens that carry the open entry.

    >>> one = torch.ones(1, 1, 3)
    >>> alpha = torch.tensor([[[0.0, 1.0, 0.0]]])
    >>> run = Tokens(one[..., None], one[..., None], one, one, alpha, one, one[0] > 0)
    >>> arrivals_that_close(run, 0).tolist()
    [[[False, False, True]]]
    """
    closes = torch.zeros_like(tokens.alpha, dtype=torch.bool)
    closes[:, :, 1:] = (tokens.alpha[:, :, 1:] < 0.5) & tokens.valid[:, None, :-1]
    # Of what carries the open entry only the last token stands for an entry.
    closes[:, :, : max(num_prefix, 1)] = False
    return closes


def shifted(tensor: Tensor, dim: int, start: int, count: int) -> Tensor:
    """Items [start, start + count) along `dim`; zeros (False) for those before the first.

    >>> shifted(torch.tensor([1, 2, 3]), 0, -2, 3).tolist()
    [0, 0, 1]
    """
    missing = min(max(-start, 0), count)
    part = tensor.narrow(dim, max(start, 0), count - missing)
    if not missing:
        return part
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), part], dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What T new tokens may attend to, once what left the ring is folded; before rotation.

    For a token at position p of its text and delay w: the entries closed by p-w, the entry open
    at p-w, and the exact tokens (p-w, p].
    """

    exact: Tokens
    """N >= T tokens: up to w-1 older ones, then the new ones."""
    open: Tokens
    """N = T running entries at p-w, one for each new token, cos and sin of their newest token;
    not valid where none is open. `alpha` means nothing."""
    visible: Tensor
    """(B, K, T) int64, entries closed by p-w: the first ones of `pages`."""
    pages: Tensor
    """(P, page_size * (D + Dv)), keys rotated."""
    table: Tensor
    """(B, K, C) int32"""
