"""Entries of a layer in packed pages; beside them the few that stay exact.

Of each head the first `SINKS` entries stay exact, for much attention goes there, and so do the
newest ones: when more than `PAGE` of them are there, the oldest `PAGE` are packed.

Legend: B batch, K kv heads, S entries, W exact entries, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec
from cachefold.cache.compressed import tensor_nbytes
from cachefold.cache.entries import Mark, PagedLists, most
from cachefold.cache.pages import Pool
from cachefold.core.accounting import cache_bytes

SINKS = 4
AT_ONCE = 512
"""Pages packed at once: codecs take a multiple of a page for a while."""


class Shape(NamedTuple):
    """Of the entries of a layer, unpacked, in the pages that attention reads."""

    batch: int
    heads: int
    page_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class PackedMark(NamedTuple):
    """A point that `PackedEntries.rewind` can go back to."""

    lists: Mark
    lengths: Tensor
    exact: dict[str, Tensor]


class PackedStore:
    """What is packed of a layer, and what stays exact, for all that entries can be used for.

    In order: sinks, packed pages, newest entries. Tensors are replaced, never changed in place,
    but for free pages.

    Args:
        shape: of the entries.
        codec: packs and unpacks them.
        device: where they are.

    >>> from cachefold.cache.codecs import get_codec
    >>> store = PackedStore(Shape(1, 3, 16, 64, 64, torch.bfloat16), get_codec("int4"), "cpu")
    >>> store.entry_nbytes(), store.nbytes_with(torch.tensor([[100, 100, 100]]))
    (256, 43080)
    """

    def __init__(self, shape: Shape, codec: Codec, device: torch.device | str) -> None:
        self.codec, self.key_dim, self.value_dim = codec, shape.key_dim, shape.value_dim
        self.page_size = shape.page_size
        lanes, width = shape[:2], codec.page_nbytes(shape.key_dim, shape.value_dim)
        self.lists = PagedLists(*lanes, Pool(PAGE, width, torch.uint8, device))
        """The packed pages of each head."""
        self.lengths = torch.zeros(lanes, dtype=torch.int64, device=device)
        """(B, K) int64, entries, exact ones included."""
        self.exact = {
            "key": torch.zeros(*lanes, 0, shape.key_dim, dtype=shape.dtype, device=device),
            "value": torch.zeros(*lanes, 0, shape.value_dim, dtype=shape.dtype, device=device),
        }
        """(B, K, W, D) keys and (B, K, W, Dv) values: sinks, then the newest; zeros where none
        is."""

    def _put(self, fresh: Tensor, full: dict[str, Tensor], spare_nbytes: int | None) -> None:
        """Packs pages behind those that are there.

        Args:
            fresh: (B, K, n) bool, pages to add to each head.
            full: keys (n, PAGE, D), values and mass of these pages, row by row.
            spare_nbytes: see `Pool.take`.
        """
        before = self.lists.lengths
        packed = before + PAGE * fresh.sum(-1)
        self.lists.cover(packed, spare_nbytes)
        batch, head, column = fresh.nonzero(as_tuple=True)
        place = self.lists.table[batch, head, before[batch, head] // PAGE + column].long()
        for start in range(0, len(place), AT_ONCE):
            part = {name: rows[start : start + AT_ONCE] for name, rows in full.items()}
            self.lists.pool.data[place[start : start + AT_ONCE]] = self.codec.encode(
                part["key"], part["value"], part.get("mass")
            )
        self.lists.lengths = packed

    def _unpacked(self) -> Rows:
        """The packed entries."""
        column = torch.arange(self.lists.table.shape[2], device=self.lengths.device)
        full = column < (self.lists.lengths // PAGE)[..., None]
        batch, head, page = full.nonzero(as_tuple=True)
        packed = self.lists.pool.data[self.lists.table[full].long()]
        key, value = self.codec.decode(packed, self.key_dim, self.value_dim)
        row = torch.arange(PAGE, device=page.device)
        slot = (SINKS + PAGE * page[:, None] + row).flatten()
        lanes = batch.repeat_interleave(PAGE), head.repeat_interleave(PAGE)
        return Rows(*lanes, slot, (key.flatten(0, 1), value.flatten(0, 1)))

    def _exact(self) -> Rows:
        """The exact entries."""
        slot = torch.arange(self.exact["key"].shape[2], device=self.lengths.device)
        there = slot < (self.lengths - self.lists.lengths)[..., None]
        batch, head, slot = there.nonzero(as_tuple=True)
        slot = slot + (slot >= SINKS) * self.lists.lengths[batch, head]
        return Rows(batch, head, slot, (self.exact["key"][there], self.exact["value"][there]))

    def select(self, rows: Tensor) -> None:
        """Makes the requests at `rows` (n,) int64 the batch; see `PagedLists.select`."""
        lengths = self.lengths.index_select(0, rows)
        exact = {name: part.index_select(0, rows) for name, part in self.exact.items()}
        self.lists.select(rows)
        self.lengths, self.exact = lengths, exact

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry, unpacked."""
        return cache_bytes(1, self.key_dim, self.value_dim, self.exact["key"].element_size())

    def kept_nbytes(self) -> int:
        """Bytes of packed pages that have an owner and of exact entries with their mass."""
        held = int((self.lengths - self.lists.lengths).sum())
        mass = 4 if "mass" in self.exact else 0
        return self.lists.pool.used_nbytes() + held * (self.entry_nbytes() + mass)

    def nbytes(self) -> int:
        """Bytes of packed pages, with and without owner, their table, exact entries, lengths."""
        return self.lists.nbytes() + tensor_nbytes([self.lengths, *self.exact.values()])

    def nbytes_with(self, lengths: Tensor) -> int:
        """Bytes at least, once the heads hold `lengths` (B, K), none less than now."""
        packed = packed_count(lengths)
        width = most(lengths - packed)
        if torch.equal(packed, self.lists.lengths):
            # Nothing is packed, so the exact entries stay as wide as they are.
            width = max(width, self.exact["key"].shape[2])
        return self.lists.nbytes_with(packed) + self._beside(len(lengths), width)

    def nbytes_at(self, rows: Tensor) -> int:
        """Bytes after `select(rows)`."""
        return self.lists.nbytes_at(rows) + self._beside(len(rows), self.exact["key"].shape[2])

    def _beside(self, batch: int, width: int) -> int:
        """Bytes of exact entries and of lengths."""
        heads, mass = self.lengths.shape[1], 4 if "mass" in self.exact else 0
        per_lane = width * (self.entry_nbytes() + mass) + self.lengths.element_size()
        return batch * heads * per_lane

    def mark(self) -> PackedMark:
        """Where `rewind` can go back to."""
        return PackedMark(self.lists.mark(), self.lengths, dict(self.exact))

    def rewind(self, mark: PackedMark) -> None:
        """Undoes what was added since `mark`; the pool has the size it had."""
        self.lists.rewind(mark.lists)
        self.lengths, self.exact = mark.lengths, mark.exact

    def tensors(self) -> dict[str, Tensor]:
        """The entries by flat names, as `load` takes them."""
        lists = self.lists
        owned = lists.table[..., : most(lists.lengths) // PAGE]
        packed = lists.pool.data.new_zeros(*owned.shape, lists.pool.data.shape[1])
        packed[owned >= 0] = lists.pool.data[owned[owned >= 0].long()]
        exact = {f"closed_{name}": part for name, part in self.exact.items()}
        return exact | {"packed": packed, "lengths": self.lengths}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave; empty before."""
        self.lengths = tensors["lengths"]
        self.exact = {name: tensors[f"closed_{name}"] for name in self.exact}
        packed = packed_count(self.lengths)
        self.lists.cover(packed)
        owned = self.lists.table >= 0
        self.lists.pool.data[self.lists.table[owned].long()] = tensors["packed"][owned]
        self.lists.lengths = packed

    def to(self, device: torch.device | str) -> None:
        """Moves the entries and what lists them."""
        self.lists.to(device)
        self.lengths = self.lengths.to(device, non_blocking=True)
        self.exact = {name: part.to(device, non_blocking=True) for name, part in self.exact.items()}


class Rows(NamedTuple):
    """n entries and where they are: request, head, place in the order of the head."""

    batch: Tensor
    head: Tensor
    slot: Tensor
    numbers: tuple[Tensor, Tensor]
    """Keys (n, D) and values (n, Dv)."""


def packed_count(lengths: Tensor) -> Tensor:
    """How many of so many entries are packed: pages between the sinks and the newest entry.

    >>> packed_count(torch.tensor([36, 37, 68, 69])).tolist()
    [0, 32, 32, 64]
    """
    return (lengths - SINKS - 1).clamp(min=0) // PAGE * PAGE
