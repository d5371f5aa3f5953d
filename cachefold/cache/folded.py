"""FoldedCache: a transformers Cache whose full-attention layers fold themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from cachefold.cache import storage
from cachefold.cache.layers import FoldedLayer
from cachefold.core import accounting


class FoldedCache(Cache):
    """Folding layers where the model is folded, transformers' own dynamic layers elsewhere.

    Args:
        config: of the model.
        folded_layers: indices of the layers that fold.
        delay: tokens each head keeps exact.
        window: most tokens an entry averages; None = no bound.

    Raises:
        ValueError: an index out of range, or a layer whose cache can't be folded.

    >>> from transformers import LlamaConfig
    >>> cache = FoldedCache(LlamaConfig(num_hidden_layers=2), folded_layers=[0, 1], delay=4)
    >>> cache.compression_ratio(), cache.nbytes()
    (1.0, 0)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        folded_layers: list[int],
        delay: int = 16,
        window: int | None = None,
    ) -> None:
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for index in folded_layers:
            if not 0 <= index < len(layers):
                raise ValueError(f"layer {index} doesn't exist; the model has {len(layers)} layers")
            if type(layers[index]) is not DynamicLayer:
                raise ValueError(
                    f"layer {index} keeps a {type(layers[index]).__name__}, and only full "
                    "attention can be folded; leave this layer out of folded_layers"
                )
            layers[index] = FoldedLayer(delay, window)
        super().__init__(layers=layers)
        self.folded_layers = sorted(folded_layers)
        self.delay = delay
        self.window = window
        text = config.get_text_config(decoder=True)
        self.num_kv_heads: int = (
            getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        )
        self.head_dim: int = (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        self.dtype: Any = text.dtype
        """Of the model's weights as its config has it; None = not said."""

    def _folded(self) -> list[FoldedLayer]:
        layers: list[Any] = self.layers
        return [layers[index] for index in self.folded_layers]

    def entries(self) -> list[Tensor]:
        """Entries each head holds (closed, open and ring), (B, K) per folded layer."""
        return [layer.entries() for layer in self._folded()]

    def compression_ratio(self) -> float:
        """Tokens seen / entries kept, totals over folded layers and heads, padding left out."""
        tokens = sum(int(_tokens_seen(layer).sum()) for layer in self._folded())
        return accounting.compression_ratio(tokens, sum(int(e.sum()) for e in self.entries()))

    def map(self) -> Tensor:
        """Compression ratio of every head, (folded layers, K) float32, totals over the batch."""
        rows = []
        for layer in self._folded():
            entries = layer.entries().sum(0)
            tokens = _tokens_seen(layer).sum(0)
            rows.append(torch.where(entries > 0, tokens / entries.clamp(min=1), 1.0).float())
        return torch.stack(rows) if rows else torch.zeros(0, 0)

    def nbytes(self) -> int:
        """Bytes of what is kept: closed entries, ring, the running sums of open entries.

        Layers that don't fold count with all they hold.
        """
        return sum(kept_bytes(layer) for layer in self.layers)

    def allocated_nbytes(self) -> int:
        """Bytes of all tensors held: spare capacity, decisions and rotary tables included."""
        total = 0
        for layer in self.layers:
            tensors = _held(layer)
            total += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        return total

    def dense_nbytes(self) -> int:
        """Bytes a dense cache would take for the same tokens, padding left out."""
        total = 0
        for layer in self.layers:
            if not isinstance(layer, FoldedLayer):
                total += kept_bytes(layer)
            elif layer.is_initialized:
                total += int(_tokens_seen(layer).sum()) * _entry_bytes(layer)
        return total

    def save(self, path: str | Path) -> None:
        """Writes the cache to one safetensors file.

        Raises:
            ValueError: a layer of a kind that can't be saved.
        """
        storage.save(self, path)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> FoldedCache:
        """Fills this cache from a file that `save` wrote; returns itself, filled or unchanged.

        Raises:
            ValueError: not such a file, or of another model or policy.
        """
        storage.load(self, path, device)
        return self

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible: see `FoldedLayer.crop`. Checked before any layer changes."""
        FoldedLayer(self.delay, self.window).crop(tokens_to_remove)


def _tokens_seen(layer: FoldedLayer) -> Tensor:
    """(B, K) int64, tokens that are not padding."""
    if layer.valid_seen is None or layer.lengths is None:
        return torch.zeros(0, 0, dtype=torch.int64)
    return layer.valid_seen[:, None].expand_as(layer.lengths)


def _entry_bytes(layer: FoldedLayer) -> int:
    """Bytes of the key and value of one entry of one head."""
    assert layer.closed_key is not None and layer.closed_value is not None
    key, value = layer.closed_key, layer.closed_value
    return accounting.cache_bytes(1, key.shape[-1], value.shape[-1], key.element_size())


def _held(layer: Any) -> list[Tensor]:
    if isinstance(layer, FoldedLayer):
        return list(layer.tensors().values())
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return [tensor for tensor in held if tensor is not None]


def kept_bytes(layer: Any) -> int:
    """Bytes of the keys, values and running sums a layer keeps, spare capacity left out."""
    if not isinstance(layer, FoldedLayer):
        return sum(tensor.numel() * tensor.element_size() for tensor in _held(layer))
    if layer.lengths is None:
        return 0
    total = int(layer.lengths.sum()) * _entry_bytes(layer)
    heads = layer.lengths.shape[1]
    if layer.ring is not None:
        total += int(layer.ring.valid.sum()) * heads * _entry_bytes(layer)
    if layer.tail is not None:
        tail = layer.tail
        per_token = sum(
            t[0, 0, 0].numel() * t.element_size() for t in (tail.key, tail.value, tail.omega)
        )
        total += int(tail.valid.sum()) * heads * per_token
    return total
