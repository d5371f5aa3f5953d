"""Keys and values of a layer that evicts: as many slots for every head, reused when free.

The only place that knows how such entries are stored. Which slots hold an entry is the caller's
matter.

Legend: B batch, K kv heads, S slots, D key dim, Dv value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.cache.compressed import tensor_nbytes

# Full slots grow by what is needed and 1 / SPARE of it, at least MIN_SPARE. Growing copies them
# all, and spare slots cost memory.
SPARE, MIN_SPARE = 32, 16


class Slots:
    """S slots of each (request, kv head), each for one key and value.

    Free slots hold finite numbers where `read` reaches them, so that weight 0 times a value is 0.

    Args:
        batch: B.
        heads: K.
        key_dim: D.
        value_dim: Dv.
        dtype: of the entries.
        device: where they are.

    >>> slots = Slots(1, 1, 2, 2, torch.float32, "cpu")
    >>> slots.cover(1)
    >>> slots.put(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 2),
    ...           torch.full((1, 1, 1, 2), 3.0))
    >>> slots.read(1)[1].tolist(), slots.capacity
    ([[[[3.0, 3.0]]]], 17)
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.key = torch.zeros(batch, heads, 0, key_dim, dtype=dtype, device=device)
        """(B, K, S, D), rotated."""
        self.value = torch.zeros(batch, heads, 0, value_dim, dtype=dtype, device=device)
        """(B, K, S, Dv)"""

    @property
    def capacity(self) -> int:
        """S."""
        return self.key.shape[2]

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry of one head."""
        return (self.key.shape[-1] + self.value.shape[-1]) * self.key.element_size()

    def cover(self, count: int, most: int | None = None) -> None:
        """Makes sure that every head has `count` slots.

        Args:
            count: slots.
            most: more than that are never needed, so that no spare ones beyond are taken.
        """
        if count > self.capacity:
            self._resize(with_spare(count, most))

    def put(self, slot: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes one entry per head, in place: adds it, or replaces what the slot held.

        Args:
            slot: (B, K, 1) int64.
            key: (B, K, 1, D), rotated.
            value: (B, K, 1, Dv).
        """
        for held, new in ((self.key, key), (self.value, value)):
            index = slot[..., None].expand_as(new)
            held.scatter_(2, index, new.detach().to(held.dtype))

    def fill(self, key: Tensor, value: Tensor, most: int | None = None) -> None:
        """Makes these entries all there are, in the first slots.

        Args:
            key: (B, K, n, D), rotated; finite throughout.
            value: (B, K, n, Dv).
            most: see `cover`.
        """
        count = key.shape[2]
        self._replace(self.key[:, :, :0], self.value[:, :, :0], with_spare(count, most))
        self.key[:, :, :count] = key.detach()
        self.value[:, :, :count] = value.detach()

    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` slots: keys (B, K, count, D) and values (B, K, count, Dv), no copy."""
        return self.key[:, :, :count], self.value[:, :, :count]

    def select(self, rows: Tensor, count: int) -> None:
        """Makes the requests at `rows` (n,) int64 the batch; shrinks when half is not needed.

        Args:
            rows: repeats allowed.
            count: slots that those requests use.
        """
        kept = count if 2 * count < self.capacity else self.capacity
        with torch.inference_mode(False):
            self.key, self.value = (x[:, :, :kept].index_select(0, rows) for x in self._both())

    def nbytes(self) -> int:
        """Bytes of all slots."""
        return tensor_nbytes(list(self._both()))

    def nbytes_at(self, rows: int, count: int) -> int:
        """Bytes after `select` of so many rows with `count` slots in use."""
        kept = count if 2 * count < self.capacity else self.capacity
        return rows * self.key.shape[1] * kept * self.entry_nbytes()

    def mark(self) -> tuple[Tensor, Tensor]:
        """Where `rewind` can go back to: steps write to free slots, all else replaces tensors."""
        return self._both()

    def rewind(self, mark: tuple[Tensor, Tensor]) -> None:
        """Undoes what was done since `mark`; slots that were free then hold anything finite."""
        self.key, self.value = mark

    def to(self, device: torch.device | str) -> None:
        """Moves all slots."""
        self.key, self.value = (x.to(device, non_blocking=True) for x in self._both())

    def _both(self) -> tuple[Tensor, Tensor]:
        return self.key, self.value

    def _resize(self, capacity: int) -> None:
        self._replace(self.key, self.value, capacity)

    # Steps write to these tensors in place, in whatever mode that happens.
    @torch.inference_mode(False)
    def _replace(self, key: Tensor, value: Tensor, capacity: int) -> None:
        """Tensors of another size that begin with `key` and `value`, zero behind."""
        grown = []
        for held in (key, value):
            batch, heads, count, dim = held.shape
            larger = held.new_zeros(batch, heads, capacity, dim)
            larger[:, :, :count] = held
            grown.append(larger)
        self.key, self.value = grown


def with_spare(count: int, most: int | None) -> int:
    """Slots to take when `count` are needed.

    >>> with_spare(320, None), with_spare(320, 321)
    (336, 321)
    """
    wanted = count + max(count // SPARE, MIN_SPARE)
    return wanted if most is None else max(min(wanted, most), count)
