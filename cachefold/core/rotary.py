"""Rotary position embedding, as transformers' Llama applies it (two halves, not pairs)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys to their positions.

    Args:
        x: (B, H, T, D), any number of heads.
        cos: (B, T, R) with R <= D (B may be 1); only the first R channels turn.
        sin: (B, T, R).

    Returns:
        (B, H, T, D).

    >>> x = torch.tensor([[[[1.0, 0.0, 5.0]]]])
    >>> rotate(x, torch.zeros(1, 1, 2), torch.ones(1, 1, 2)).flatten().tolist()
    [0.0, 1.0, 5.0]
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    num_rotary = cos.shape[-1]
    turned, rest = x[..., :num_rotary], x[..., num_rotary:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned
