"""Entries, compression ratios and bytes: the only place with such arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

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


def count_entries(alphas: Iterable[Tensor], valid: Tensor, delay: int) -> tuple[int, int]:
    """Tokens seen and entries kept, totals over layers, heads and the batch; padding left out.

    Args:
        alphas: (B, K, T) hard decisions of each layer; see `entries_kept`.
        valid: (B, T) bool, False at padding.
        delay: tokens kept exact (the ring).

    >>> import torch
    >>> alpha = torch.tensor([[[0., 1, 0, 1], [0., 0, 0, 0]]])
    >>> count_entries([alpha], torch.ones(1, 4, dtype=torch.bool), 0)
    (8, 6)
    """
    tokens = int(valid.sum())
    seen = kept = 0
    for alpha in alphas:
        seen += tokens * alpha.shape[1]
        kept += int(entries_kept(alpha, valid, delay).sum())
    return seen, kept


def compression_ratio(tokens: int | float, entries: int | float) -> float:
    """Tokens seen / entries kept, both totals over heads and layers; 1.0 for an empty cache.

    >>> compression_ratio(4, 2)
    2.0
    """
    return float(tokens) / float(entries) if entries else 1.0


def cache_bytes(num_entries: int, key_dim: int, value_dim: int, itemsize: int) -> int:
    """Bytes of the keys and values of `num_entries` entries, counted over all heads.

    >>> cache_bytes(10, 64, 64, 2)
    2560
    """
    return num_entries * (key_dim + value_dim) * itemsize
