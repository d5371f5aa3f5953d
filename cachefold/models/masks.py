"""Reads which new tokens are real from the mask transformers hands to an attention layer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HIDES = -1e3
"""What an additive mask hides gets this or less."""
ROWS = 1024
"""Rows of a mask that are checked at once, so that it takes little memory beside the mask."""


def valid_tokens(
    attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device,
    *, check: bool = True,
) -> Tensor:  # fmt: skip
    """Finds padding.

    Args:
        attention_mask: None (no padding), (B, S) of 0/1, or (B, 1, T, S) bool or additive float:
            the causal mask of the sdpa and eager paths, whose last row sees every real token. Of
            that of one new token only its own column is looked at.
        batch: B.
        tokens: T, new tokens, the last T of the S columns.
        device: where the answer goes.
        check: look at all of a mask; one layer is enough, as all get the same.

    Returns:
        (B, T) bool, True at real tokens.

    Raises:
        ValueError: a mask of another kind, or one that is not causal, keeps several texts in a row
            apart, or says anything else but what is padding.
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
    if attention_mask.dim() == 4:
        if check and not _says_only_padding(attention_mask, tokens):
            raise ValueError(
                "the attention mask says more than which tokens are padding: several texts packed "
                "in one row (position_ids that start again), a prefix that sees what comes after "
                "it, a hole, a bias or heads of their own, and a folded layer can't keep to that; "
                "give every text a row of its own, with padding, and no other mask"
            )
        attention_mask = attention_mask[:, 0, -1]
    return _sees(attention_mask[..., -tokens:]).expand(batch, tokens)


def _sees(mask: Tensor) -> Tensor:
    """A mask as bool."""
    return mask > -1 if mask.is_floating_point() else mask.bool()


def _says_only_padding(mask: Tensor, tokens: int) -> bool:
    """Whether all rows of a mask follow from the last one, which sees every real token.

    Args:
        mask: (B, 1, T, S) bool or additive.
        tokens: T.
    """
    past = mask.shape[3] - tokens
    if mask.shape[1:3] != (1, tokens) or past < 0:
        return False
    if tokens == 1:  # a look at the device at every step would cost more than it tells
        return True
    last = _sees(mask[:, 0, -1:])
    for start in range(0, tokens, ROWS):
        added = mask[:, 0, start : start + ROWS]
        part = _sees(added)
        first = past + start
        causal = part.new_ones(part.shape[1:]).tril(first)
        # Padding may see anything but itself: a token that does is real.
        real = last[:, 0, first : first + part.shape[1]] | part.diagonal(first, -2, -1)
        odd = part ^ (last & causal)
        if mask.is_floating_point():
            odd = odd | ((added != 0) & ~(added <= HIDES))
        # Bytes have a fast maximum, unlike bools.
        if bool((odd.view(torch.uint8).amax(-1) * real).any()):
            return False
    return True


# Every layer asks in every step.
@functools.lru_cache(maxsize=8)
def _all_valid(batch: int, tokens: int, device: torch.device) -> Tensor:
    """(batch, tokens) of True; shared, not to be changed."""
    with torch.inference_mode(False):
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
