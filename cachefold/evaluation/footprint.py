"""What a cache held after the texts that went through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cachefold.cache.folded import FoldedCache, kept_bytes
from cachefold.core import accounting


@dataclass(frozen=True, slots=True)
class Footprint:
    """Tokens and entries of finished texts, each text counted at its end; they add up.

    >>> total = Footprint(100, 50.0, 512, 1024) + Footprint(20, 10.0, 128, 128)
    >>> total.cr, total.bytes_ratio
    (2.0, 0.5555555555555556)
    """

    tokens: int = 0
    """Tokens seen, padding left out."""
    entries: float = 0.0
    """Entries kept of them, mean over layers and heads."""
    cache_bytes: int = 0
    """Bytes of what was kept."""
    dense_bytes: int = 0
    """Bytes of a dense cache of the same tokens."""

    @property
    def cr(self) -> float:
        """Tokens seen / entries kept; 1 where nothing ran."""
        return accounting.compression_ratio(self.tokens, self.entries)

    @property
    def bytes_ratio(self) -> float:
        """Cache bytes / dense bytes; 1 where nothing ran."""
        return self.cache_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.tokens + other.tokens, self.entries + other.entries,
            self.cache_bytes + other.cache_bytes, self.dense_bytes + other.dense_bytes,
        )  # fmt: skip

    def __sub__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.tokens - other.tokens, self.entries - other.entries,
            self.cache_bytes - other.cache_bytes, self.dense_bytes - other.dense_bytes,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"seen {self.tokens:,} | cr {self.cr:.2f} | cache {self.bytes_ratio:.1%} of dense"


def measure(cache: Any, valid: Tensor) -> Footprint:
    """Reads what a cache holds now.

    Args:
        cache: a FoldedCache, or transformers' own cache of a dense model.
        valid: (B, T) bool, the tokens it was fed, False at padding.
    """
    tokens = int(valid.sum())
    if isinstance(cache, FoldedCache):
        entries = tokens / cache.compression_ratio()
        return Footprint(tokens, entries, cache.nbytes(), cache.dense_nbytes())
    # A dense cache stores padding too, and it is not counted for a folded one.
    held = sum(map(kept_bytes, cache.layers)) * tokens // valid.numel()
    return Footprint(tokens, tokens, held, held)
