"""Reads which new tokens are real from the mask transformers hands to an attention layer."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_tokens(
    attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device
) -> Tensor:
    """Finds padding.

    Args:
        attention_mask: None (no padding), (B, S) of 0/1, or (B, 1, T, S) bool or additive float:
            the causal mask of the sdpa and eager paths, whose last row sees every real token.
        batch: B.
        tokens: T, new tokens, the last T of the S columns.
        device: where the answer goes.

    Returns:
        (B, T) bool, True at real tokens.

    Raises:
        ValueError: a mask of another kind.
    """
    if attention_mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"a folded layer can't read a {type(attention_mask).__name__} mask; load the model "
            'with attn_implementation="sdpa" or "eager"'
        )
    row = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, -1]
    row = row[:, -tokens:]
    valid = row > -1 if row.is_floating_point() else row.bool()
    return valid.expand(batch, tokens)
