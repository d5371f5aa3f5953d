"""Fewer kv heads by mean pooling (GQA: Ainslie et al. 2023, section 2.1).

The mean of projections is the projection by the mean of their weights, so pooling keys and values
is the same as pooling the weights that make them.
"""

from __future__ import annotations

from torch import Tensor


def pool_heads(x: Tensor, heads: int | None) -> Tensor:
    """Takes the mean over groups of neighbouring heads.

    Args:
        x: (B, K, T, D).
        heads: K', a divisor of K; None = all stay.

    Returns:
        (B, K', T, D).

    >>> import torch
    >>> pool_heads(torch.tensor([[[[1.0]], [[3.0]]]]), 1).flatten().tolist()
    [2.0]
    """
    if heads is None or heads == x.shape[1]:
        return x
    return x.unflatten(1, (heads, -1)).mean(2)
