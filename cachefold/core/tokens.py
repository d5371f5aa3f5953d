"""Runs of tokens with what is needed to fold them later.

Legend: B batch, K kv heads, N tokens, D key dim, Dv value dim, R rotary dim (<= D).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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

    def tensors(self) -> list[Tensor]:
        """Its tensors, in the order of the fields of `Tokens`."""
        # Named one by one: decoding asks in every layer, and `fields` takes microseconds.
        return [self.key, self.value, self.cos, self.sin, self.alpha, self.omega, self.valid]

    def narrow(self, start: int, stop: int) -> Tokens:
        """Views tokens [start, stop)."""
        return Tokens(
            *(
                getattr(self, field.name).narrow(token_dim(field.name), start, stop - start)
                for field in fields(Tokens)
            )
        )

    def slice(self, start: int, stop: int) -> Tokens:
        """Copies tokens [start, stop), detached, so that the rest can be freed."""
        part = self.narrow(start, stop)
        return Tokens(
            *(
                tensor.detach().clone(memory_format=torch.contiguous_format)
                for tensor in part.tensors()
            )
        )


def token_dim(name: str) -> int:
    """Dim of field `name` of `Tokens` that counts tokens.

    >>> token_dim("key"), token_dim("cos")
    (2, 1)
    """
    return 1 if name in ("cos", "sin", "valid") else 2
