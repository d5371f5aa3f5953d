"""Runs of tokens a folding layer carries, and the stream it hands to attention.

Legend: B batch, K kv heads, N tokens, S closed entries, D key dim, Dv value dim, R rotary dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of tokens with what is needed to fold them later."""

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
        return [getattr(self, field.name) for field in fields(Tokens)]

    def slice(self, start: int, stop: int) -> Tokens:
        """Copies tokens [start, stop), detached, so that the rest can be freed."""
        return Tokens(
            *(
                getattr(self, field.name)
                .narrow(_token_dim(field.name), start, stop - start)
                .detach()
                .clone(memory_format=torch.contiguous_format)
                for field in fields(Tokens)
            )
        )


def _token_dim(name: str) -> int:
    return 1 if name in ("cos", "sin", "valid") else 2


def clean(new: Tokens) -> Tokens:
    """New tokens as the stream holds them: no NaN of padding, whole batch, wide weights."""
    padding = ~new.valid[:, None, :, None]
    batch = new.key.shape[0]
    return replace(
        new,
        # Whatever stands at padding, NaN included, must not reach a sum.
        key=new.key.masked_fill(padding, 0.0),
        value=new.value.masked_fill(padding, 0.0),
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
            torch.cat([getattr(part, field.name) for part in parts], _token_dim(field.name))
            for field in fields(Tokens)
        )
    )


@dataclass(frozen=True, slots=True)
class Stream(Tokens):
    """What attention needs: [open entry | ring | new tokens], and the entries closed before.

    `key` and `value` have the dtype of the new tokens. The open entry is one pseudo token (no
    window) or its last tokens (window); only the last of these `num_prefix` tokens stands for an
    entry, and none may be seen exactly.
    """

    merged_key: Tensor
    """(B, K, N, D) running mean after each token, before rotary embedding, float32 or float64."""
    merged_value: Tensor
    """(B, K, N, Dv)"""
    num_prefix: int
    """Leading tokens that carry the open entry."""
    closed_key: Tensor
    """(B, K, S, D) rotated at the newest token of each entry; garbage where not in the mask."""
    closed_value: Tensor
    """(B, K, S, Dv)"""
    closed_mask: Tensor
    """(B, K, S) bool, True where an entry exists."""

    def tokens(self) -> Tokens:
        """The stream without entries."""
        return Tokens(*(getattr(self, field.name) for field in fields(Tokens)))
