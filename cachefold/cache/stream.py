"""From runs of tokens to what new tokens may attend to.

Legend: B batch, K kv heads, N tokens, T new tokens, D key dim, Dv value dim, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cachefold.core.merging import size_bias
from cachefold.core.rotary import rotate
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
    named = [part.named() for part in parts]
    return parts[0].map(lambda name, _: torch.cat([run[name] for run in named], token_dim(name)))


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


def open_entries(means: Tokens, start: int, count: int) -> Tokens:
    """Running entries [start, start + count), not valid before the first.

    >>> one = torch.ones(1, 1, 1)
    >>> run = Tokens(one[..., None], one[..., None], one, one, one, one, one[0] > 0, 3 * one)
    >>> open_entries(run, -1, 2).valid.tolist(), open_entries(run, -1, 2).size.tolist()
    ([[False, True]], [[[1.0, 3.0]]])
    """
    part = means.map(lambda name, tensor: shifted(tensor, token_dim(name), start, count))
    # A bias of log(0) would be hidden, but NaN in the gradient of what it is multiplied by.
    return part if part.size is None else replace(part, size=part.size.clamp(min=1.0))


class Finish(NamedTuple):
    """What is done to keys as their entries close; for inference."""

    key_scale: Tensor | None
    """(D,) factors, after the rotation; None = 1."""
    size_weight: Tensor | None
    """(K,), adds `merging.size_bias` as one channel more; None = no such channel."""

    def keys(self, means: Tokens, ends: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """(n, D) or (n, D + 1) keys as they lie in pages, row by row.

        Args:
            means: running entries after each token.
            ends: request, head and last token of the entries that close, (n,) int64 each.
            dtype: of the cache, in which the exact keys of the model are rotated too.
        """
        batch, head, token = ends
        keys = means.key[batch, head, token].detach().to(dtype)
        cos, sin = (x[batch, token, None] for x in (means.cos, means.sin))
        keys = rotate(keys[:, None, None], cos, sin)[:, 0, 0]
        keys = keys if self.key_scale is None else keys * self.key_scale
        if self.size_weight is None:
            return keys
        assert means.size is not None
        bias = size_bias(means.size, self.size_weight.detach())[batch, head, token]
        return torch.cat([keys, bias[:, None].to(dtype)], -1)


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
    """(P, page_size * (D + Dv)), keys rotated; D counts the bias of an entry if it has one."""
    table: Tensor
    """(B, K, C) int32"""
