"""The folding KV cache: what each head keeps, layer by layer, behind transformers' Cache API."""

from __future__ import annotations

from cachefold.cache.folded import FoldedCache
from cachefold.cache.layers import FoldedLayer
from cachefold.cache.stream import Stream

__all__ = ["FoldedCache", "FoldedLayer", "Stream"]
