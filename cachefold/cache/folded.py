"""FoldedCache: a transformers Cache whose full-attention layers fold or evict."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from cachefold.cache import storage
from cachefold.cache.codecs import get_codec
from cachefold.cache.compressed import CompressedLayer, refuse_crop
from cachefold.cache.evicting import EvictingLayer
from cachefold.cache.layers import FoldedLayer
from cachefold.cache.limit import ByteLimit, dense_tensors, held_nbytes
from cachefold.core import accounting
from cachefold.core.eviction import Evictor


class FoldedCache(Cache):
    """Compressing layers where the model is folded, transformers' own dynamic layers elsewhere.

    Args:
        config: of the model.
        folded_layers: indices of the layers that fold.
        delay: tokens each head keeps exact.
        window: most tokens an entry averages; None = no bound.
        paged: entries are in pages; the only storage there is, so False is refused.
        page_size: entries per page, 16 or 32.
        max_bytes: most bytes of `allocated_nbytes()`; a step or a larger batch that would need
            more raises a ValueError and leaves the cache as it was. While a step runs, pages that
            move to a larger pool, and with a limit the ring before the step, come on top. None =
            no limit.
        backend: of attention over this cache, `auto` or a name of `cachefold ls backends`.
        evictor: a training-free policy: these layers then evict instead of folding, and delay,
            window, page_size and backend mean nothing.
        codec: how entries are packed, a name of `cachefold ls codecs`; None = they keep the dtype
            of the model. The first entries of each head, the newest and the open one stay exact.
        cr: ratio that a model with a dial is asked for, tokens seen / entries kept; None = that
            of its policy.
        preset: kind of text its dial was calibrated for, such as `code`; None = the default one.
        kv_heads: kv heads that are left after pooling; None = those of the model.
        proportional: entries are weighed by how many tokens they hold.

    Raises:
        ValueError: an index out of range, a layer whose cache can't be folded, paging options
            out of range, or an unknown codec.

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
        paged: bool = True,
        page_size: int = 16,
        max_bytes: int | None = None,
        backend: str = "auto",
        evictor: Evictor | None = None,
        codec: str | None = None,
        cr: float | None = None,
        preset: str | None = None,
        kv_heads: int | None = None,
        proportional: bool = False,
    ) -> None:
        if not paged:
            raise ValueError(
                "paged=False: entries are kept in pages only, padded buffers are gone; leave it "
                "out (cache.layers[i].closed.padded() copies them into the padded form)"
            )
        packing = None if codec is None else get_codec(codec)
        layers: list[Any] = list(DynamicCache(config=config).layers)
        self._config = config
        self.max_bytes = max_bytes
        self.backend = backend
        self._limit = None if max_bytes is None else ByteLimit(max_bytes, layers)
        for index in folded_layers:
            _check_foldable(layers, index)
            layers[index] = (
                FoldedLayer(delay, window, page_size, self._limit, packing) if evictor is None
                else EvictingLayer(evictor, index, self._limit, packing)
            )  # fmt: skip
        super().__init__(layers=layers)
        self.folded_layers = sorted(folded_layers)
        self.delay = delay
        self.window = window
        self.page_size = page_size
        self.evictor = evictor
        self.codec = codec
        self.cr = cr
        self.preset = preset
        self.kv_heads = kv_heads
        self.proportional = proportional
        text = config.get_text_config(decoder=True)
        self.num_kv_heads: int = (
            getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        )
        self.head_dim: int = (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        self.dtype: Any = text.dtype
        """Of the model's weights as its config has it; None = not said."""

    def _folded(self) -> list[CompressedLayer]:
        layers: list[Any] = self.layers
        return [layers[index] for index in self.folded_layers]

    def _dense_entries(self, layer: CompressedLayer) -> int:
        """Entries that a dense layer would hold, of all kv heads that the model has."""
        return int(layer.tokens_seen()[:, :1].sum()) * self.num_kv_heads

    def entries(self) -> list[Tensor]:
        """Entries each head holds (closed, open and ring), (B, K) per folded layer."""
        return [layer.entries() for layer in self._folded()]

    def compression_ratio(self) -> float:
        """Tokens seen / entries kept, totals over folded layers and heads, padding left out.

        Tokens count for every kv head of the model, so that pooled heads compress too.
        """
        tokens = sum(self._dense_entries(layer) for layer in self._folded())
        return accounting.compression_ratio(tokens, sum(int(e.sum()) for e in self.entries()))

    def map(self) -> Tensor:
        """Compression ratio of every head, (folded layers, K) float32, totals over the batch."""
        rows = []
        for layer in self._folded():
            entries = layer.entries().sum(0)
            tokens = layer.tokens_seen().sum(0)
            rows.append(torch.where(entries > 0, tokens / entries.clamp(min=1), 1.0).float())
        return torch.stack(rows) if rows else torch.zeros(0, 0)

    def nbytes(self) -> int:
        """Bytes of what is kept: closed entries, ring, the running sums of open entries.

        Layers that don't fold count with all they hold.
        """
        return sum(kept_bytes(layer) for layer in self.layers)

    def allocated_nbytes(self) -> int:
        """Bytes of all tensors held: free pages, block tables, ring and rotary tables included."""
        return sum(held_nbytes(layer) for layer in self.layers)

    def dense_nbytes(self) -> int:
        """Bytes a dense cache would take for the same tokens, padding left out."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                total += self._dense_entries(layer) * layer.entry_nbytes()
            else:
                total += kept_bytes(layer)
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
            ValueError: not such a file, of another model or policy, or over `max_bytes`.
        """
        if self._limit is None:
            storage.load(self, path, device)
            return self
        self._limit.forget()
        with self._limit.step(*self.layers):
            storage.load(self, path, device)
        return self

    def reserve(self, tokens: int) -> None:
        """Takes the memory for `tokens` further tokens, whatever is decided.

        Steps of one token then move no keys and values. Layers that fold change nothing at all
        but what stands in their tensors: for CUDA graphs and torch.compile.

        Raises:
            ValueError: no prompt yet, or over `max_bytes`; nothing was changed.
        """
        if tokens < 1:
            raise ValueError(f"tokens to reserve must be >= 1, got {tokens}")
        if not all(layer.is_initialized for layer in self._folded()):
            raise ValueError(
                "an empty cache doesn't know its batch yet; feed the prompt, then reserve"
            )
        with self._limit.step(*self.layers) if self._limit else contextlib.nullcontext():
            for layer in self._folded():
                layer.reserve(tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds the tokens of a layer that doesn't fold.

        Raises:
            ValueError: over `max_bytes`.
        """
        add = functools.partial(
            super().update, key_states, value_states, layer_idx, *args, **kwargs
        )
        if self._limit is None:
            return add()
        with self._limit.step(self.layers[layer_idx]):
            return add()

    def reset(self) -> None:
        """Forgets everything and frees all pages."""
        if self._limit is not None:
            self._limit.forget()
        fresh = DynamicCache(config=self._config).layers
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                layer.reset()
            else:
                # transformers zeroes what a dynamic layer holds, and 5.17 does not shorten it.
                self.layers[index] = fresh[index]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes the sequences at `beam_idx` (n,) the batch: those asked for again are copied.

        Raises:
            ValueError: over `max_bytes`; nothing was changed.
        """
        self._check_rows(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times.

        Raises:
            ValueError: over `max_bytes`; nothing was changed.
        """
        self._check_rows(self._rows().repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at `indices` (positions or a mask).

        Raises:
            ValueError: over `max_bytes`; nothing was changed.
        """
        self._check_rows(self._rows()[indices.cpu()])
        super().batch_select_indices(indices)

    def _rows(self) -> Tensor:
        """Positions of the sequences, (B,) int64 on the CPU."""
        sizes = [layer.num_requests for layer in self._folded() if layer.is_initialized]
        return torch.arange(sizes[0] if sizes else 0)

    def _check_rows(self, rows: Tensor) -> None:
        if self._limit is not None:
            self._limit.check_rows(rows)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible: checked before any layer changes.

        Raises:
            ValueError: always.
        """
        refuse_crop(tokens_to_remove)


def _check_foldable(layers: list[Any], index: int) -> None:
    if not 0 <= index < len(layers):
        raise ValueError(f"layer {index} doesn't exist; the model has {len(layers)} layers")
    if type(layers[index]) is not DynamicLayer:
        raise ValueError(
            f"layer {index} keeps a {type(layers[index]).__name__}, and only full "
            "attention can be folded; leave this layer out of folded_layers"
        )


def kept_bytes(layer: Any) -> int:
    """Bytes of what a layer of any kind keeps, spare capacity left out."""
    if isinstance(layer, CompressedLayer):
        return layer.kept_nbytes()
    return sum(tensor.numel() * tensor.element_size() for tensor in dense_tensors(layer))
