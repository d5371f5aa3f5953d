"""What a folding layer holds, whatever it folds.

Legend: B batch, K kv heads, S closed entries, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachefold.cache.codecs import Biased, Codec
from cachefold.cache.compressed import CompressedLayer, refuse_other, tensor_nbytes
from cachefold.cache.entries import PagedEntries
from cachefold.cache.packed import Shape
from cachefold.cache.packed_entries import PackedEntries
from cachefold.cache.pages import PagePool, check_page_size
from cachefold.cache.ring import in_order
from cachefold.core.accounting import cache_bytes
from cachefold.core.tokens import NAMES, Tokens


def has_sizes(tensors: dict[str, Tensor]) -> bool:
    """Whether what `FoldedState.tensors` gave has entries weighed by their size.

    >>> has_sizes({"tail.size": torch.ones(1, 1, 1)})
    True
    """
    return any(name.endswith(".size") for name in tensors)


class FoldedState(CompressedLayer):
    """Closed entries in pages; beside them the open entry and the ring.

    Args:
        page_size: entries per page, 16 or 32.
        codec: packs closed entries; None = they keep their dtype.

    Raises:
        ValueError: another page size.
    """

    def __init__(self, page_size: int, codec: Codec | None = None) -> None:
        super().__init__()
        check_page_size(page_size)
        self.page_size = page_size
        self.codec = codec
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.valid_seen: Tensor | None = None  # (B,) int64, tokens that are not padding
        self.closed: PagedEntries | PackedEntries | None = None  # keys rotated
        self.tail: Tokens | None = None  # the open entry
        self.ring: Tokens | None = None  # the newest tokens, exact
        self.turn: Tensor | None = None  # () int64, oldest token of a circular ring; None: in order
        self.ahead = 0  # steps that have their pages
        self.has_sizes = False  # closed entries have a bias: one more channel of their keys
        self.is_initialized = False
        self.dims = (0, 0)  # D and Dv of tokens
        self.itemsize = 0  # bytes of a number of an entry

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.dims = key_states.shape[-1], value_states.shape[-1]
        dims = self.dims[0] + self.has_sizes, self.dims[1]
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.itemsize = dtype.itemsize
        if self.codec is None:
            pool = PagePool(self.page_size, *dims, dtype, self.device)
            self.closed = PagedEntries(batch, heads, pool)
        else:
            shape = Shape(batch, heads, self.page_size, *dims, dtype)
            codec = Biased(self.codec, dtype) if self.has_sizes else self.codec
            self.closed = PackedEntries(shape, codec, self.device)
        self.valid_seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    @property
    def lengths(self) -> Tensor | None:
        """(B, K) int64, closed entries of each head; None before the first token."""
        return None if self.closed is None else self.closed.lengths

    def entries(self) -> Tensor:
        """Entries each head holds, (B, K) int64: closed, the open one, and the ring."""
        if self.lengths is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        count = self.lengths
        if self.tail is not None:
            count = count + self.tail.valid[:, -1:]
        return count if self.ring is None else count + self.ring.valid.sum(1, keepdim=True)

    @property
    def num_requests(self) -> int:
        """B, 0 before the first token."""
        return 0 if self.closed is None else len(self.closed.lengths)

    def tokens_seen(self) -> Tensor:
        """Tokens that are not padding, (B, K) int64."""
        if self.valid_seen is None or self.lengths is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        return self.valid_seen[:, None].expand_as(self.lengths)

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one token of one head, 0 before the first token.

        A closed entry may have more: its bias.
        """
        if self.closed is None:
            return 0
        return cache_bytes(1, *self.dims, self.itemsize)

    def kept_nbytes(self) -> int:
        """Bytes of closed entries, ring and the running sums of open entries."""
        if self.closed is None:
            return 0
        total, heads = self.closed.kept_nbytes(), self.closed.lengths.shape[1]
        if self.ring is not None:
            total += int(self.ring.valid.sum()) * heads * self.entry_nbytes()
        if self.tail is not None:
            sums = [self.tail.key, self.tail.value, self.tail.omega]
            sums += [] if self.tail.size is None else [self.tail.size]
            per_token = sum(t[0, 0, 0].numel() * t.element_size() for t in sums)
            total += int(self.tail.valid.sum()) * heads * per_token
        return total

    def nbytes(self) -> int:
        """Bytes of all tensors held: pages with and without owner, block table, ring, the rest."""
        if self.closed is None:
            return 0
        return self.closed.nbytes() + self._beside_nbytes()

    def nbytes_at(self, rows: Tensor) -> int:
        """Bytes of all tensors held once the batch is that at `rows` (n,) int64."""
        if self.closed is None:
            return 0
        shared = 0 if self.turn is None else tensor_nbytes([self.turn])
        beside = (self._beside_nbytes() - shared) * len(rows) // max(self.num_requests, 1)
        return self.closed.nbytes_at(rows) + beside + shared

    def _check(self, new: Tokens) -> None:
        """Refuses tokens of another model or batch than those before."""
        assert self.closed is not None
        held = (*self.closed.lengths.shape, self.dims[0], self.dtype)
        got = (new.key.shape[0], new.key.shape[1], new.key.shape[3], new.key.dtype)
        if got != held:
            refuse_other(held, got)
        if (new.size is not None) != self.has_sizes:
            raise ValueError(
                f"this cache was filled with proportional={self.has_sizes} and the model has "
                f"proportional={not self.has_sizes}; make a new cache for this model"
            )

    def _beside_nbytes(self) -> int:
        """Bytes of what is held beside the closed entries."""
        runs = [run for run in (self.tail, self.ring) if run is not None]
        parts = [tensor for run in runs for tensor in run.tensors()]
        return tensor_nbytes([*parts, *(t for t in (self.valid_seen, self.turn) if t is not None)])

    def in_place(self) -> dict[str, Any]:
        """Copies of what a step of one token changes in place; else tensors are replaced."""
        if self.turn is None:
            return {}
        names = ("ring", "tail", "turn", "valid_seen")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def mark(self) -> Any:
        """Where `rewind` can go back to."""
        return None if self.closed is None else self.closed.mark()

    def rewind(self, mark: Any) -> None:
        """Undoes what was added to the closed entries since `mark`."""
        if mark is not None:
            assert self.closed is not None
            self.closed.rewind(mark)

    def tensors(self) -> dict[str, Tensor]:
        """The state by flat names, as `load_tensors` takes it; entries padded with zeros."""
        if self.closed is None:
            return {}
        assert self.valid_seen is not None
        found = self.closed.tensors() | {"valid_seen": self.valid_seen}
        for run, tokens in (("tail", self.tail), ("ring", self.ordered_ring())):
            for name, tensor in ({} if tokens is None else tokens.named()).items():
                found[f"{run}.{name}"] = tensor
        return found

    def ordered_ring(self) -> Tokens | None:
        """The ring with its oldest token first; a copy where it is circular."""
        if self.ring is None or self.turn is None:
            return self.ring
        return in_order(self.ring, self.turn)

    def load_tensors(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Replaces the whole state by what `tensors` gave and the number of tokens seen."""
        self._clear()
        if not tensors:
            return
        self.has_sizes = has_sizes(tensors)
        key = tensors["closed_key"]
        key = key[..., : key.shape[-1] - self.has_sizes]
        self.lazy_initialization(key, tensors["closed_value"])
        assert self.closed is not None
        self.closed.load(tensors)
        self.valid_seen = tensors["valid_seen"]
        for run in ("tail", "ring"):
            if f"{run}.key" in tensors:
                parts = {name: tensors.get(f"{run}.{name}") for name in NAMES}
                setattr(self, run, Tokens(**parts))  # type: ignore[arg-type]
        self.seen = seen

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor beside the closed entries."""
        for run in ("tail", "ring"):
            tokens = getattr(self, run)
            if tokens is not None:
                setattr(self, run, tokens.map(lambda _, tensor: function(tensor)))
        if self.valid_seen is not None:
            self.valid_seen = function(self.valid_seen)

    @torch.inference_mode(False)
    def _move(self, device: torch.device | str) -> None:
        if self.closed is not None:
            self.closed.to(device)
        self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.turn is not None:
            self.turn = self.turn.to(device, non_blocking=True)

    # Steps change these tensors in place, in whatever mode that happens.
    @torch.inference_mode(False)
    def _select(self, rows: Tensor) -> None:
        """Makes the sequences at `rows` (n,) int64 the batch; repeats are copied."""
        if self.closed is None:
            return
        rows = rows.to(self.closed.lengths.device)
        self.closed.select(rows)
        self._map(lambda tensor: tensor.index_select(0, rows))
