"""Entries, compression ratios and bytes: the only place with such arithmetic."""

from __future__ import annotations

from torch import Tensor


def entries_kept(alpha: Tensor, valid: Tensor, delay: int) -> Tensor:
    """Entries each head holds after the whole text: ring, closed entries and the open one.

    Args:
        alpha: (B, K, T) hard decisions, 0 at the first token and at padding.
        valid: (B, T) bool, False at padding.
        delay: tokens kept exact (the ring).

    Returns:
        (B, K) int64.

    >>> import torch
    >>> entries_kept(torch.tensor([[[0., 1, 0, 1]]]), torch.ones(1, 4, dtype=torch.bool), 0).item()
    2
    """
    folded = alpha.shape[-1] - min(delay, alpha.shape[-1])
    in_ring = valid[:, folded:].sum(-1)
    appended = ((alpha[..., :folded] < 0.5) & valid[:, None, :folded]).sum(-1)
    return appended + in_ring[:, None]


def compression_ratio(tokens: int | float, entries: int | float) -> float:
    """Tokens seen / entries kept, both totals over heads and layers; 1.0 for an empty cache.

    >>> compression_ratio(4, 2)
    2.0
    """
    return float(tokens) / float(entries) if entries else 1.0


def cache_bytes(num_entries: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the keys and values of `num_entries` entries of one head.

    >>> cache_bytes(10, 64, 2)
    2560
    """
    return 2 * num_entries * head_dim * itemsize
