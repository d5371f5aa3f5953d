"""Closed entries of a folding layer in packed pages, and how attention reads them.

Legend: B batch, K kv heads, S entries, W exact entries, D key dim, Dv value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec
from cachefold.cache.entries import most
from cachefold.cache.packed import SINKS, PackedStore, Shape, packed_count
from cachefold.core.pages import key_view, value_view


class PackedEntries(PackedStore):
    """The closed entries of every (request, kv head) of a layer, packed by a codec.

    Args:
        shape: of the entries.
        codec: packs and unpacks them.
        device: where they are.

    >>> from cachefold.cache.codecs import get_codec
    >>> shape = Shape(1, 1, 16, 2, 2, torch.float32)
    >>> entries = PackedEntries(shape, get_codec("int4"), "cpu")
    >>> ones = torch.ones(40, 2)
    >>> pages, table = entries.append(torch.ones(1, 1, 40, dtype=torch.bool), ones, ones)
    >>> table.tolist(), entries.exact["key"].shape, entries.lists.table.tolist()
    ([[[0, 1, 2]]], torch.Size([1, 1, 8, 2]), [[[0]]])
    """

    def __init__(self, shape: Shape, codec: Codec, device: torch.device | str) -> None:
        super().__init__(shape, codec, device)
        if codec.weighs:  # (B, K, W)
            self.exact["mass"] = torch.zeros(*shape[:2], 0, dtype=torch.float32, device=device)

    def append(
        self,
        new: Tensor,
        key: Tensor,
        value: Tensor,
        spare_nbytes: int | None = None,
        mass: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds entries; packs the pages that are full.

        Args:
            new: (B, K, M) bool; each True is an entry of that head, in order.
            key: (n, D), rotated, for the n True in `new`, row by row.
            value: (n, Dv).
            spare_nbytes: see `Pool.take`.
            mass: (n,) summed weights, for a codec that weighs.

        Returns:
            What `read` gives, with all new entries exact.
        """
        held = self.lengths - self.lists.lengths
        wider = max(most(held + new.sum(-1)) - self.exact["key"].shape[2], 0)
        batch, head, _ = new.nonzero(as_tuple=True)
        slot = (held[..., None] + new.cumsum(-1) - 1)[new]
        grown = {}
        for name, rows in (("key", key), ("value", value), ("mass", mass)):
            if (old := self.exact.get(name)) is not None:
                assert rows is not None
                blank = old.new_zeros(*old.shape[:2], wider, *old.shape[3:])
                grown[name] = torch.cat([old, blank], 2)
                grown[name][batch, head, slot] = rows.to(old.dtype)
        self.exact, self.lengths = grown, self.lengths + new.sum(-1)
        seen = self.read()
        self._pack(spare_nbytes)
        return seen

    def _pack(self, spare_nbytes: int | None) -> None:
        """Moves full pages from the exact entries to the packed ones."""
        fill = (packed_count(self.lengths) - self.lists.lengths) // PAGE
        if not most(fill):
            return
        fresh = torch.arange(most(fill), device=fill.device) < fill[..., None]
        full = {
            name: part[:, :, SINKS : SINKS + fresh.shape[2] * PAGE].unflatten(2, (-1, PAGE))[fresh]
            for name, part in self.exact.items()
        }
        self._put(fresh, full, spare_nbytes)
        self._drop(fill * PAGE)

    def _drop(self, gone: Tensor) -> None:
        """Drops the first `gone` (B, K) exact entries behind the sinks."""
        held = self.lengths - self.lists.lengths
        slot = torch.arange(most(held), device=held.device)
        empty = slot >= held[..., None]
        origin = (slot + (slot >= SINKS) * gone[..., None]).masked_fill(empty, 0)
        batch, head = (torch.arange(n, device=held.device) for n in held.shape)
        for name, part in self.exact.items():
            part = part[batch[:, None, None], head[:, None], origin]
            part[empty] = 0.0
            self.exact[name] = part

    def read(self) -> tuple[Tensor, Tensor]:
        """Unpacks the entries, for one call of attention.

        Returns:
            Pages (P, page_size * (D + Dv)) as attention reads them, garbage where no entry is,
            and the table (B, K, C) int32 of the pages of each head, then -1.
        """
        size, key = self.page_size, self.exact["key"]
        needed = -(-self.lengths // size)
        owned = torch.arange(most(needed), device=key.device) < needed[..., None]
        table = torch.full(owned.shape, -1, dtype=torch.int32, device=key.device)
        count = int(needed.sum())
        table[owned] = torch.arange(count, dtype=torch.int32, device=key.device)
        pages = key.new_empty(count, size * (self.key_dim + self.value_dim))
        keys, values = key_view(pages, size, self.key_dim), value_view(pages, size, self.key_dim)
        for batch, head, slot, numbers in (self._unpacked(), self._exact()):
            page, row = table[batch, head, slot // size].long(), slot % size
            keys[page, :, row] = numbers[0].to(key.dtype)
            values[page, row] = numbers[1].to(key.dtype)
        return pages, table
