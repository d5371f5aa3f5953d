"""Keys and values of a layer that evicts: as many slots for every head, reused when free.

The only place that knows how such entries are stored. Which slots hold an entry is the caller's
matter.

Legend: B batch, K kv heads, S slots, N entries, Q queries, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cachefold.cache.compressed import tensor_nbytes

# Full slots grow by what is needed and 1 / SPARE of it, at least MIN_SPARE. Growing copies them
# all, and spare slots cost memory.
SPARE, MIN_SPARE = 32, 16

Pair = tuple[Tensor, Tensor]
"""Keys (B, K, n, D) and values (B, K, n, Dv)."""


class Packed(NamedTuple):
    """N entries as they are once packed, and which of Q queries see them so."""

    key: Tensor
    """(B, K, N, D), rotated."""
    value: Tensor
    """(B, K, N, Dv)"""
    old: Tensor
    """(B, K, 1, Q, N) bool."""


class Sight(NamedTuple):
    """What queries see of N entries."""

    key: Tensor
    """(B, K, N, D), rotated."""
    value: Tensor
    """(B, K, N, Dv)"""
    packed: Packed | None = None
    """None where nothing is packed, or it is unpacked already."""


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
    >>> first = torch.zeros(1, 1, 1, dtype=torch.int64)
    >>> slots.put(first, torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 3.0), first)
    >>> slots.read(first, torch.tensor([1]))[1].tolist(), slots.capacity
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

    @property
    def dims(self) -> tuple[int, int, int]:
        """B, K and D."""
        batch, heads, _, dim = self.key.shape
        return batch, heads, dim

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

    def put(self, slot: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
        """Writes one entry per head, in place: adds it, or replaces what the slot held.

        Args:
            slot: (B, K, 1) int64.
            key: (B, K, 1, D), rotated.
            value: (B, K, 1, Dv).
            position: (B, K, 1), of the token in its text, negative at padding.
        """
        for held, new in ((self.key, key), (self.value, value)):
            index = slot[..., None].expand_as(new)
            held.scatter_(2, index, new.detach().to(held.dtype))

    def fill(
        self, columns: tuple[Tensor, ...], position: Tensor, seen: Tensor, most: int | None = None
    ) -> None:
        """Makes these entries all there are, in the first slots.

        Args:
            columns: of n entries, finite throughout; see `columns`.
            position: (B, K, n), as for `put`.
            seen: (B,) int64 on the CPU, tokens seen of each text.
            most: see `cover`.
        """
        key, value = columns
        self._become(key, value, most)

    def _become(self, key: Tensor, value: Tensor, most: int | None) -> None:
        count = key.shape[2]
        self._replace(self.key[:, :, :0], self.value[:, :, :0], with_spare(count, most))
        self.key[:, :, :count] = key.detach()
        self.value[:, :, :count] = value.detach()

    def read(self, position: Tensor, seen: Tensor) -> Pair:
        """What the newest token sees in the first slots, no copy.

        Args:
            position: (B, K, n), of the entries in the first n slots, negative where none is.
            seen: (B,) int64 on the CPU, tokens seen of each text.
        """
        count = position.shape[2]
        return self.key[:, :, :count], self.value[:, :, :count]

    def columns(self, position: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        """All there is to know of the entries in the first slots, one tensor (B, K, n, ...) each.

        Here keys and values. Entries can be joined with others and picked column by column, and
        then given to `sight` and `fill`. For the arguments see `read`.
        """
        return self.read(position, seen)

    def arriving(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The columns of new entries, (B, K, n, D) rotated keys and (B, K, n, Dv) values."""
        return key, value

    def sight(self, columns: tuple[Tensor, ...], position: Tensor, query: Tensor) -> Sight:
        """What queries see of entries.

        Args:
            columns: of N entries.
            position: (B, K, N), of the entries.
            query: (B, 1, Q), positions of the queries.
        """
        key, value = columns
        return Sight(key, value)

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

    def kept_nbytes(self, count: int) -> int:
        """Bytes of `count` entries."""
        return count * self.entry_nbytes()

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

    def tensors(self, position: Tensor) -> dict[str, Tensor]:
        """The first slots by flat names, as `load` takes them; zero where `position` is free."""
        count, free = position.shape[2], (position < 0)[..., None]
        key, value = (held[:, :, :count].masked_fill(free, 0) for held in self._both())
        return {"slot_key": key, "slot_value": value}

    def load(self, tensors: dict[str, Tensor], most: int | None) -> None:
        """Takes over what `tensors` gave; `most` as in `cover`."""
        self._become(tensors["slot_key"], tensors["slot_value"], most)

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
