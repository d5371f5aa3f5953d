"""A cache of three layers, of which the first and the last fold, and what it holds."""

from __future__ import annotations

from transformers import LlamaConfig

from cachefold.cache import FoldedCache, Stream
from cachefold.core.tokens import Tokens
from tests.cache.texts import HEADS, Text


def new_cache(
    max_bytes: int | None = None, delay: int = 4, codec: str | None = None
) -> FoldedCache:
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=24, num_attention_heads=4, num_key_value_heads=HEADS
    )
    return FoldedCache(config, [0, 2], delay=delay, max_bytes=max_bytes, codec=codec)


def extend(cache: FoldedCache, text: Text, start: int, stop: int) -> list[Stream]:
    """One forward; what the two layers that fold give to attention."""
    part = text.part(start, stop)
    first = cache.layers[0].extend(Tokens(*part))
    cache.update(part[0], part[1], 1)
    return [first, cache.layers[2].extend(Tokens(*part))]


def state(cache: FoldedCache) -> list:
    """What the layers that fold hold, the keys of the one that does not, and the tokens seen."""
    folded = [layer.tensors() for layer in (cache.layers[0], cache.layers[2])]
    listed = [{name: tensor.tolist() for name, tensor in parts.items()} for parts in folded]
    dense = cache.layers[1]
    keys = dense.keys.tolist() if dense.is_initialized and dense.keys is not None else None
    return [listed, keys, cache.get_seq_length()]
