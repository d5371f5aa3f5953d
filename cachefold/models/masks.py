"""Reads which new tokens are real from the mask transformers hands to an attention layer."""

from __future__ import annotations

import functools

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
        ValueError: a mask of another kind, or one that keeps several texts in a row apart.
    """
    if attention_mask is None:
        if torch.compiler.is_compiling():  # a graph sees through the cache of the next line
            return torch.ones(batch, tokens, dtype=torch.bool, device=device)
        return _all_valid(batch, tokens, device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"a folded layer can't read a {type(attention_mask).__name__} mask; load the model "
            'with attn_implementation="sdpa" or "eager"'
        )
    new = attention_mask[..., -tokens:]
    new = new > -1 if new.is_floating_point() else new.bool()
    if new.dim() == 2:
        return new.expand(batch, tokens)
    valid = new[:, 0, -1]
    if tokens > 1:
        own = new[:, 0].diagonal(dim1=-2, dim2=-1)
        if bool((own & ~valid).any()):
            raise ValueError(
                "the attention mask hides tokens from the last one that see themselves: several "
                "texts packed in one row (position_ids that start again), which a folded layer "
                "can't keep apart; give every text a row of its own, with padding"
            )
    return valid.expand(batch, tokens)


# Every layer asks in every step.
@functools.lru_cache(maxsize=8)
def _all_valid(batch: int, tokens: int, device: torch.device) -> Tensor:
    """(batch, tokens) of True; shared, not to be changed."""
    with torch.inference_mode(False):
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
