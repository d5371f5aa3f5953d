"""A limit on the bytes of a whole cache that loses nothing when it is reached.

The layers of a step ask one after the other, and what a later one needs is not known before: it
depends on its decisions. So the layers that went before are remembered until the step is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cachefold.cache.compressed import CompressedLayer


class _Memory(NamedTuple):
    """A layer before a step; copies of the tensors that the step may change in place."""

    state: dict[str, Any]
    mark: Any


@dataclass(eq=False)
class ByteLimit:
    """Keeps the tensors of all layers within `max_bytes`, layers that don't fold included.

    A layer that folds is refused before it takes a page; one that doesn't is measured after it
    grew. Either way all layers are then as they were before the step.
    """

    max_bytes: int
    """Most bytes of `FoldedCache.allocated_nbytes()` between two steps."""
    layers: list[Any]
    """All layers of the cache."""
    _before: dict[int, _Memory] = field(default_factory=dict)
    _nbytes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(
                f"max_bytes must be a number of bytes >= 1, or None for no limit; got "
                f"{self.max_bytes}"
            )

    @contextmanager
    def step(self, *layers: Any) -> Iterator[None]:
        """Around what adds tokens to `layers`; when it fails, the whole step is taken back.

        Raises:
            ValueError: the cache would hold more than `max_bytes`.
        """
        indices = [i for i, one in enumerate(self.layers) if any(one is x for x in layers)]
        if any(i in self._before for i in indices):
            self._before.clear()
        if not self._before:
            self._nbytes.clear()
        for i in indices:
            self._before[i] = _remember(self.layers[i])
        try:
            yield
            self._nbytes.update((i, held_nbytes(self.layers[i])) for i in indices)
            if (total := self._others(None)) > self.max_bytes:
                self._refuse(total)
        except BaseException:  # Ctrl-C as well: half a step would be worse than none
            for i, memory in self._before.items():
                _restore(self.layers[i], memory)
            self.forget()
            raise
        if len(self._before) == len(self.layers):
            self._before.clear()

    def spare(self, layer: Any, nbytes: int) -> int:
        """Bytes for spare pages once `layer` holds `nbytes`: what is left but for an eighth.

        Near the limit a layer must not take for later what others need in this step.

        Raises:
            ValueError: less than nothing is left.
        """
        total = self._others(layer) + nbytes
        if total > self.max_bytes:
            self._refuse(total)
        return max(self.max_bytes - total - self.max_bytes // 8, 0)

    def check_rows(self, rows: Tensor) -> None:
        """Refuses to make the sequences at `rows` (n,) int64 the batch when that is too much.

        Raises:
            ValueError: the cache would hold more than `max_bytes`.
        """
        self.forget()
        total = 0
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                total += layer.nbytes_at(rows)
            else:
                batch = layer.keys.shape[0] if layer.is_initialized else 1
                total += held_nbytes(layer) * len(rows) // max(batch, 1)
        if total > self.max_bytes:
            self._refuse(total)

    def forget(self) -> None:
        """The layers changed otherwise: no step can be taken back, bytes are counted anew."""
        self._before.clear()
        self._nbytes.clear()

    def _others(self, layer: Any) -> int:
        """Bytes of all layers but this one."""
        for i, other in enumerate(self.layers):
            if i not in self._nbytes:
                self._nbytes[i] = held_nbytes(other)
        return sum(self._nbytes[i] for i, other in enumerate(self.layers) if other is not layer)

    def _refuse(self, total: int) -> NoReturn:
        raise ValueError(
            f"the cache would hold at least {total:,} bytes, more than max_bytes={self.max_bytes:,}"
            "; nothing was changed. Drop sequences (cache.batch_select_indices), start over "
            "(cache.reset), feed fewer tokens, or make the cache with a larger max_bytes"
        )


def held_nbytes(layer: Any) -> int:
    """Bytes of all tensors a layer of any kind holds."""
    if isinstance(layer, CompressedLayer):
        return layer.nbytes()
    return sum(tensor.untyped_storage().nbytes() for tensor in dense_tensors(layer))


def dense_tensors(layer: Any) -> list[Tensor]:
    """Keys and values of a layer that doesn't fold, (B, K, T, D) each."""
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


# A copy may be restored and then changed in place, in whatever mode that happens.
@torch.inference_mode(False)
def _remember(layer: Any) -> _Memory:
    state = dict(vars(layer))
    if not isinstance(layer, CompressedLayer):
        return _Memory(state, None)
    return _Memory(state | layer.in_place(), layer.mark())


def _restore(layer: Any, memory: _Memory) -> None:
    vars(layer).clear()
    vars(layer).update(memory.state)
    if isinstance(layer, CompressedLayer):
        layer.rewind(memory.mark)
