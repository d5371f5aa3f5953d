"""Closed entries of a layer: ragged lists over requests and heads, kept in pages.

A block table lists the pages of each (request, kv head) in order. Nothing is padded to the
longest head: a head wastes less than one page.

Legend: B batch, K kv heads, S entries, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.cache.pages import PagePool, Pool
from cachefold.core.accounting import cache_bytes
from cachefold.core.pages import gather, slots


class Mark(NamedTuple):
    """A point that `PagedEntries.rewind` can go back to, while entries are only appended."""

    table: Tensor
    lengths: Tensor
    num_pages: int
    free: list[int]


class PagedLists:
    """Which pages of a pool hold the entries of every (request, kv head) of a layer, in order.

    A page belongs to one (request, head). The table may list pages ahead of the entries. Tensors
    are replaced, never changed in place, but for free slots of the pool and, by a step of
    attention, `lengths`.

    Args:
        batch: B.
        heads: K.
        pool: where the pages come from; not shared.

    >>> lists = PagedLists(1, 1, Pool(32, 8, torch.uint8, "cpu"))
    >>> lists.cover(torch.tensor([[33]]))
    >>> lists.table.tolist(), lists.lengths.tolist()
    ([[[0, 1]]], [[0]])
    """

    def __init__(self, batch: int, heads: int, pool: Pool) -> None:
        self.pool = pool
        device = pool.data.device
        self.table = torch.empty(batch, heads, 0, dtype=torch.int32, device=device)
        """(B, K, max_pages) int32, the pages of each head in order, then -1."""
        self.lengths = torch.zeros(batch, heads, dtype=torch.int64, device=device)
        """(B, K) int64, entries."""

    def cover(self, lengths: Tensor, spare_nbytes: int | None = None) -> None:
        """Makes sure that there are pages for that many entries of each head.

        Args:
            lengths: (B, K) int64.
            spare_nbytes: see `PagePool.take`.
        """
        held = self._held()
        needed = torch.maximum(held, self._pages(lengths))
        count = int((needed - held).sum())
        if not count:
            return
        wider = max(most(needed) - self.table.shape[2], 0)
        table = F.pad(self.table, (0, wider), value=-1)
        column = torch.arange(table.shape[2], device=table.device)
        fresh = (column >= held[..., None]) & (column < needed[..., None])
        table[fresh] = self.pool.take(count, spare_nbytes)
        self.table = table

    def _held(self) -> Tensor:
        """(B, K) int64, pages that the table lists."""
        return (self.table >= 0).sum(-1)

    def _pages(self, lengths: Tensor) -> Tensor:
        """Pages for that many entries, any shape."""
        return (lengths + self.pool.page_size - 1) // self.pool.page_size

    def select(self, rows: Tensor) -> None:
        """Makes the requests at `rows` (n,) int64 the batch, in this order, repeats allowed.

        The first to ask for a request gets its pages, the others get copies; the pages of
        requests nobody asked for are freed. The pool shrinks when more than half of it is free.
        """
        # What can fail, for want of an index or of memory, comes before what changes anything.
        chosen = rows.tolist()
        lengths = self.lengths.index_select(0, rows)
        table = self.table.index_select(0, rows)
        table = table[..., : most((table >= 0).sum(-1))].clone(
            memory_format=torch.contiguous_format
        )
        lost = self.table[sorted(set(range(len(self.table))) - set(chosen))]
        lost = lost[lost >= 0]
        again = [i for i, row in enumerate(chosen) if row in chosen[:i]]
        shared = torch.zeros_like(table, dtype=torch.bool)
        shared[again] = table[again] >= 0
        copies = self.pool.data.index_select(0, table[shared])
        self.pool.reserve(len(copies) - len(lost))
        self.pool.give_back(lost)
        pages = self.pool.take(len(copies))
        self.pool.data[pages.long()] = copies
        table[shared] = pages
        self.table, self.lengths = table, lengths
        if self._shrinks(self.pool.num_pages - self.pool.num_free):
            self._compact()

    def _compact(self) -> None:
        """Drops the free pages."""
        owned, table = self.table >= 0, self.table.clone()
        self.pool.keep(self.table[owned])
        table[owned] = torch.arange(self.pool.num_pages, dtype=table.dtype, device=table.device)
        self.table = table

    def _shrinks(self, used: int) -> bool:
        return 2 * used < self.pool.num_pages

    def nbytes(self) -> int:
        """Bytes of pool, table and lengths."""
        tensors = (self.table, self.lengths)
        return self.pool.nbytes() + sum(t.untyped_storage().nbytes() for t in tensors)

    def nbytes_with(self, lengths: Tensor) -> int:
        """Bytes at least, once the heads hold `lengths` (B, K), none less than now."""
        needed = torch.maximum(self._held(), self._pages(lengths))
        num_pages = max(self.pool.num_pages, int(needed.sum()))
        return self._nbytes(num_pages, lengths, max(most(needed), self.table.shape[2]))

    def nbytes_at(self, rows: Tensor) -> int:
        """Bytes after `select(rows)`."""
        rows = rows.to(self.lengths.device)
        held = self._held().index_select(0, rows)
        used = int(held.sum())
        num_pages = used if self._shrinks(used) else max(self.pool.num_pages, used)
        return self._nbytes(num_pages, held, most(held))

    def _nbytes(self, num_pages: int, lengths: Tensor, columns: int) -> int:
        table = lengths.numel() * columns * self.table.element_size()
        return num_pages * self.pool.page_nbytes + table + lengths.numel() * lengths.element_size()

    def mark(self) -> Mark:
        """Where `rewind` can go back to."""
        return Mark(self.table, self.lengths.clone(), self.pool.num_pages, self.pool.free)

    def rewind(self, mark: Mark) -> None:
        """Undoes what was added since `mark`; the pool has the size it had."""
        self.table, self.lengths = mark.table, mark.lengths
        self.pool.rewind(mark.num_pages, mark.free)

    def to(self, device: torch.device | str) -> None:
        """Moves the pages and what lists them."""
        self.table = self.table.to(device, non_blocking=True)
        self.lengths = self.lengths.to(device, non_blocking=True)
        self.pool.data = self.pool.data.to(device, non_blocking=True)


class PagedEntries(PagedLists):
    """The closed entries of every (request, kv head) of a layer, as attention reads them.

    >>> entries = PagedEntries(1, 1, PagePool(16, 2, 2, torch.float32, "cpu"))
    >>> ones = torch.ones(20, 2)
    >>> pages, table = entries.append(torch.ones(1, 1, 20, dtype=torch.bool), ones, ones)
    >>> entries.lengths.tolist(), entries.table.tolist()
    ([[20]], [[[0, 1]]])
    """

    pool: PagePool

    def append(
        self,
        new: Tensor,
        key: Tensor,
        value: Tensor,
        spare_nbytes: int | None = None,
        mass: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds entries behind those that are there.

        Args:
            new: (B, K, M) bool; each True is an entry of that head, in order.
            key: (n, D), rotated, for the n True in `new`, row by row.
            value: (n, Dv).
            spare_nbytes: see `Pool.take`.
            mass: what `PackedEntries` may weigh entries by; here all are kept alike.

        Returns:
            What `read` gives.
        """
        lengths = self.lengths + new.sum(-1)
        self.cover(lengths, spare_nbytes)
        batch, head, _ = new.nonzero(as_tuple=True)
        slot = (self.lengths[..., None] + new.cumsum(-1) - 1)[new]
        size = self.pool.page_size
        page, row = self.table[batch, head, slot // size].long(), slot % size
        self.pool.keys[page, :, row] = key.to(self.pool.data.dtype)
        self.pool.values[page, row] = value.to(self.pool.data.dtype)
        self.lengths = lengths
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """Pages (P, page_size * (D + Dv)) and table (B, K, C) int32, for attention; no copies."""
        return self.pool.data, self.table

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies the entries out of the pages, for attention in plain torch.

        That is a copy of all entries; kernels will read pool, table and lengths directly.

        Returns:
            Keys (B, K, S, D), values (B, K, S, Dv) and a mask (B, K, S), True where an entry
            exists; garbage elsewhere. S is a multiple of the page size.
        """
        pool = self.pool
        key, value = gather(pool.data, pool.page_size, pool.key_dim, self.table)
        return key, value, slots(self.lengths, self.table.shape[2], pool.page_size)

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry."""
        pool = self.pool
        return cache_bytes(1, pool.key_dim, pool.value_dim, pool.data.element_size())

    def kept_nbytes(self) -> int:
        """Bytes of the entries, spare capacity left out."""
        return int(self.lengths.sum()) * self.entry_nbytes()

    def tensors(self) -> dict[str, Tensor]:
        """The entries by flat names, as `load` takes them, padded with zeros."""
        key, value, mask = self.padded()
        longest, empty = most(self.lengths), ~mask[..., None]
        return {
            "closed_key": key.masked_fill_(empty, 0.0)[:, :, :longest],
            "closed_value": value.masked_fill_(empty, 0.0)[:, :, :longest],
            "lengths": self.lengths,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` gave; empty before."""
        key, value, lengths = (tensors[n] for n in ("closed_key", "closed_value", "lengths"))
        mask = torch.arange(key.shape[2], device=key.device) < lengths[..., None]
        self.append(mask, key[mask], value[mask])


def most(pages: Tensor) -> int:
    """Largest of the counts, 0 of none."""
    return int(pages.max()) if pages.numel() else 0
