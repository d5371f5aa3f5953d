"""What a folding layer holds, and what transformers asks of it whatever it folds.

Legend: B batch, K kv heads, S closed entries, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cachefold.cache.entries import PagedEntries
from cachefold.cache.pages import PagePool, check_page_size
from cachefold.cache.ring import in_order
from cachefold.core.tokens import Tokens


class FoldedState(CacheLayerMixin):
    """Closed entries in pages; beside them the open entry and the ring.

    Args:
        page_size: entries per page, 16 or 32.

    Raises:
        ValueError: another page size.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, page_size: int) -> None:
        super().__init__()
        check_page_size(page_size)
        self.page_size = page_size
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.valid_seen: Tensor | None = None  # (B,) int64, tokens that are not padding
        self.closed: PagedEntries | None = None  # keys rotated
        self.tail: Tokens | None = None  # the open entry
        self.ring: Tokens | None = None  # the newest tokens, exact
        self.turn: Tensor | None = None  # () int64, oldest token of a circular ring; None: in order
        self.ahead = 0  # steps that have their pages
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        dims = key_states.shape[-1], value_states.shape[-1]
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.closed = PagedEntries(
            batch, heads, PagePool(self.page_size, *dims, dtype, self.device)
        )
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

    def _beside_nbytes(self) -> int:
        """Bytes of what is held beside the closed entries."""
        runs = [run for run in (self.tail, self.ring) if run is not None]
        parts = [tensor for run in runs for tensor in run.tensors()]
        return tensor_nbytes([*parts, *(t for t in (self.valid_seen, self.turn) if t is not None)])

    def tensors(self) -> dict[str, Tensor]:
        """The state by flat names, as `load_tensors` takes it; entries padded with zeros."""
        if self.closed is None:
            return {}
        assert self.valid_seen is not None
        key, value, mask = self.closed.padded()
        longest = int(self.closed.lengths.max()) if self.closed.lengths.numel() else 0
        empty = ~mask[..., None]
        found = {
            "closed_key": key.masked_fill_(empty, 0.0)[:, :, :longest],
            "closed_value": value.masked_fill_(empty, 0.0)[:, :, :longest],
            "lengths": self.closed.lengths,
            "valid_seen": self.valid_seen,
        }
        for run, tokens in (("tail", self.tail), ("ring", self.ordered_ring())):
            for field in fields(Tokens) if tokens is not None else ():
                found[f"{run}.{field.name}"] = getattr(tokens, field.name)
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
        key, value, lengths = (tensors[n] for n in ("closed_key", "closed_value", "lengths"))
        self.lazy_initialization(key, value)
        assert self.closed is not None
        mask = torch.arange(key.shape[2], device=key.device) < lengths[..., None]
        self.closed.append(mask, key[mask], value[mask])
        self.valid_seen = tensors["valid_seen"]
        for run in ("tail", "ring"):
            if f"{run}.key" in tensors:
                parts = [tensors[f"{run}.{field.name}"] for field in fields(Tokens)]
                setattr(self, run, Tokens(*parts))
        self.seen = seen

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor beside the closed entries."""
        for run in ("tail", "ring"):
            tokens = getattr(self, run)
            if tokens is not None:
                setattr(self, run, Tokens(*map(function, tokens.tensors())))
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

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; positions go on from here."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers all tokens seen, as for a dense cache."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        if self.closed is not None:
            self._move(self.device)

    def reset(self) -> None:
        """Forgets everything and frees all pages."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Picks sequences for beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        self._select(torch.arange(self.num_requests).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at `indices` (positions or a mask)."""
        self._select(torch.arange(self.num_requests)[indices.cpu()])


def tensor_nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storage of tensors that share none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
