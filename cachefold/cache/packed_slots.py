"""Slots of packed entries, each packed alone; beside them the few that are read exact.

A slot is packed when it is written. The first `SINKS` tokens of a text and its newest `RECENT` are
read from exact copies instead: which form a query sees is a matter of positions alone, not of how
the text was fed.

Legend: B batch, K kv heads, S slots, N entries, Q queries, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.cache.codecs import PAGE, Codec, Vectors
from cachefold.cache.compressed import tensor_nbytes
from cachefold.cache.packed import SINKS
from cachefold.cache.slots import Packed, Pair, Sight, Slots

RECENT = PAGE
EXACT = SINKS + RECENT
"""Exact copies that each head has room for."""


class PackedMark(NamedTuple):
    """A point that `PackedSlots.rewind` can go back to."""

    rows: Pair
    exact: Pair


class PackedSlots:
    """As `Slots`, with keys and values packed by a codec.

    Args:
        batch: B.
        heads: K.
        key_dim: D.
        value_dim: Dv.
        dtype: of the entries, unpacked.
        device: where they are.
        codec: packs and unpacks them.

    >>> from cachefold.cache.codecs import get_codec
    >>> slots = PackedSlots(1, 3, 64, 64, torch.bfloat16, "cpu", get_codec("int4"))
    >>> slots.cover(1000, most=1000)
    >>> slots.entry_nbytes(), slots.nbytes() == 3 * (1000 * 80 + 36 * 256)
    (256, True)
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        codec: Codec,
    ) -> None:
        keys, values = codec.alone()
        self.packing = Vectors(keys, key_dim), Vectors(values, value_dim)
        widths = self.packing[0].nbytes, self.packing[1].nbytes
        self.rows = Slots(batch, heads, *widths, torch.uint8, device)
        """What is packed, as if it were entries."""
        self.exact = (
            torch.zeros(batch, heads, EXACT, key_dim, dtype=dtype, device=device),
            torch.zeros(batch, heads, EXACT, value_dim, dtype=dtype, device=device),
        )
        """Keys (B, K, EXACT, D) and values (B, K, EXACT, Dv), each at its `_place`; replaced, not
        changed in place. Those of entries that are gone may stand there."""

    @property
    def dims(self) -> tuple[int, int, int]:
        """B, K and D."""
        batch, heads, _, dim = self.exact[0].shape
        return batch, heads, dim

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry of one head, unpacked."""
        return sum(part.shape[-1] * part.element_size() for part in self.exact)

    def cover(self, count: int, most: int | None = None) -> None:
        """Makes sure that every head has `count` slots; see `Slots.cover`."""
        self.rows.cover(count, most)

    def put(self, slot: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
        """Writes one entry per head; see `Slots.put`."""
        _, _, packed_key, packed_value = self.arriving(key, value)
        self.rows.put(slot, packed_key, packed_value, position)
        self._keep((key, value), position, position)  # new tokens are exact to themselves

    def fill(
        self, columns: tuple[Tensor, ...], position: Tensor, seen: Tensor, most: int | None = None
    ) -> None:
        """Makes these entries all there are; see `Slots.fill`."""
        key, value, *packed = columns
        self.rows.fill(tuple(packed), position, seen, most)
        self._keep((key, value), position, _newest(seen, position))

    def _keep(self, pair: Pair, position: Tensor, newest: Tensor) -> None:
        """Copies of the entries (B, K, n, ...) that are exact to the newest token."""
        # What is not to be kept goes to a row that is cut off again.
        free = (position < 0) | ~_is_exact(position, newest)
        place = _place(position).masked_fill(free, EXACT)[..., None]
        kept = []
        for held, new in zip(self.exact, pair, strict=True):
            rows = F.pad(held, (0, 0, 0, 1))
            rows = rows.scatter(2, place.expand_as(new), new.detach().to(held.dtype))
            kept.append(rows[:, :, :EXACT].clone())
        self.exact = kept[0], kept[1]

    def read(self, position: Tensor, seen: Tensor) -> Pair:
        """Unpacks the slots for the attention of one query; see `Slots.read`."""
        exact = _is_exact(position, _newest(seen, position))[..., None]
        place, rows = _place(position)[..., None], self._decoded(*self.rows.read(position, seen))
        key, value = (
            torch.where(exact, held.gather(2, place.expand_as(row)), row)
            for held, row in zip(self.exact, rows, strict=True)
        )
        return key, value

    def _decoded(self, *packed: Tensor) -> Pair:
        key, value = (
            vectors.decode(part).to(held.dtype)
            for vectors, part, held in zip(self.packing, packed, self.exact, strict=True)
        )
        return key, value

    def columns(self, position: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        """Keys, values and both packed; see `Slots.columns`."""
        return *self.read(position, seen), *self.rows.read(position, seen)

    def arriving(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The columns of new entries."""
        packed = (
            vectors.encode(part.detach())
            for vectors, part in zip(self.packing, (key, value), strict=True)
        )
        return key, value, *packed

    def sight(self, columns: tuple[Tensor, ...], position: Tensor, query: Tensor) -> Sight:
        """What queries see of entries; see `Slots.sight`."""
        key, value, *packed = columns
        old = ~_is_exact(position[:, :, None], query[..., None])
        return Sight(key, value, Packed(*self._decoded(*packed), old[:, :, None]))

    def select(self, rows: Tensor, count: int) -> None:
        """Makes the requests at `rows` (n,) int64 the batch; see `Slots.select`."""
        self.rows.select(rows, count)
        self.exact = self.exact[0].index_select(0, rows), self.exact[1].index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes of all slots and of the exact copies."""
        return self.rows.nbytes() + tensor_nbytes(list(self.exact))

    def kept_nbytes(self, count: int) -> int:
        """Bytes of `count` packed entries and of all exact copies."""
        return self.rows.kept_nbytes(count) + tensor_nbytes(list(self.exact))

    def nbytes_at(self, rows: int, count: int) -> int:
        """Bytes after `select` of so many rows with `count` slots in use."""
        heads = self.exact[0].shape[1]
        return self.rows.nbytes_at(rows, count) + rows * heads * EXACT * self.entry_nbytes()

    def mark(self) -> PackedMark:
        """Where `rewind` can go back to."""
        return PackedMark(self.rows.mark(), self.exact)

    def rewind(self, mark: PackedMark) -> None:
        """Undoes what was done since `mark`; see `Slots.rewind`."""
        self.rows.rewind(mark.rows)
        self.exact = mark.exact

    def tensors(self, position: Tensor) -> dict[str, Tensor]:
        """The entries by flat names, as `load` takes them."""
        packed = self.rows.tensors(position)
        return {
            "slot_key": self.exact[0], "slot_value": self.exact[1],
            "packed_key": packed["slot_key"], "packed_value": packed["slot_value"],
        }  # fmt: skip

    def load(self, tensors: dict[str, Tensor], most: int | None) -> None:
        """Takes over what `tensors` gave."""
        packed = {f"slot_{name}": tensors[f"packed_{name}"] for name in ("key", "value")}
        self.rows.load(packed, most)
        self.exact = tensors["slot_key"], tensors["slot_value"]

    def to(self, device: torch.device | str) -> None:
        """Moves slots and exact copies."""
        self.rows.to(device)
        key, value = (part.to(device, non_blocking=True) for part in self.exact)
        self.exact = key, value


def _newest(seen: Tensor, like: Tensor) -> Tensor:
    """(B, 1, 1), position of the newest of `seen` (B,) tokens, where `like` is."""
    return (seen - 1).to(like.device)[:, None, None]


def _is_exact(position: Tensor, query: Tensor) -> Tensor:
    """Whether a query sees an entry exact: bool, positions broadcast."""
    return (position < SINKS) | (query - position < RECENT)


def _place(position: Tensor) -> Tensor:
    """Where the exact copy of an entry is, int64 of any shape; anywhere for free slots.

    No two that are exact at once share a place.
    """
    beyond = SINKS + (position - SINKS) % RECENT
    return torch.where(position < SINKS, position.clamp(min=0), beyond).long()
