"""Runs of tokens with what is needed to fold them later.

Legend: B batch, K kv heads, N tokens, D key dim, Dv value dim, R rotary dim (<= D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of tokens with what is needed to fold them later.

    >>> one = torch.ones(1, 1, 3)
    >>> run = Tokens(one[..., None], one[..., None], one.mT, one.mT, one, one, one[0] > 0)
    >>> run.narrow(1, 3).key.shape
    torch.Size([1, 1, 2, 1])
    """

    key: Tensor
    """(B, K, N, D), before rotary embedding."""
    value: Tensor
    """(B, K, N, Dv)"""
    cos: Tensor
    """(B, N, R)"""
    sin: Tensor
    """(B, N, R)"""
    alpha: Tensor
    """(B, K, N), 0 or 1"""
    omega: Tensor
    """(B, K, N), importance weights; the summed weight for a carried open entry."""
    valid: Tensor
    """(B, N) bool, False at padding."""
    size: Tensor | None = None
    """(B, K, N), how many tokens each stands for: 1, or those merged into a carried open entry.
    None = nothing depends on it."""

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of the fields of `Tokens`."""
        # Named one by one: decoding asks in every layer, and `fields` takes microseconds.
        found = [self.key, self.value, self.cos, self.sin, self.alpha, self.omega, self.valid]
        return found if self.size is None else [*found, self.size]

    def named(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return dict(zip(NAMES, self.tensors(), strict=False))

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Tokens:
        """The run that `change(name of the field, tensor)` makes of it."""
        return Tokens(**{name: change(name, tensor) for name, tensor in self.named().items()})

    def narrow(self, start: int, stop: int) -> Tokens:
        """Views tokens [start, stop)."""
        return self.map(lambda name, tensor: tensor.narrow(token_dim(name), start, stop - start))

    def slice(self, start: int, stop: int) -> Tokens:
        """Copies tokens [start, stop), detached, so that the rest can be freed."""
        part = self.narrow(start, stop)
        return part.map(
            lambda _, tensor: tensor.detach().clone(memory_format=torch.contiguous_format)
        )


NAMES = ("key", "value", "cos", "sin", "alpha", "omega", "valid", "size")
"""The fields of `Tokens`, in order; `dataclasses.fields` is slow and can't be compiled."""


def token_dim(name: str) -> int:
    """Dim of field `name` of `Tokens` that counts tokens.

    >>> token_dim("key"), token_dim("cos")
    (2, 1)
    """
    return 1 if name in ("cos", "sin", "valid") else 2
