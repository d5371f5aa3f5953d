"""One layer of a cache that evicts: the entries held, their positions and scores.

Legend: B batch, K kv heads, T new tokens, S slots in use, D key dim, Dv value dim. After a token
every head has at most one free slot before its last entry: the next token takes it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.cache.codecs import Codec
from cachefold.cache.compressed import CompressedLayer, refuse_other, tensor_nbytes
from cachefold.cache.packed_slots import PackedSlots
from cachefold.cache.slots import Pair, Slots
from cachefold.core.eviction import FREE, Arrivals, Evictor, arrivals, held_count

if TYPE_CHECKING:
    from cachefold.cache.limit import ByteLimit


class EvictingLayer(CompressedLayer):
    """Holds what a training-free policy keeps of one attention layer. For inference: no gradient.

    Attention and eviction are the caller's (`models.evicting`). Keys and values change in place
    only where a slot is free; all other tensors are replaced.

    Args:
        evictor: the policy.
        index: of the layer.
        limit: on the bytes of the whole cache; None = no limit.
        codec: packs entries; None = they keep their dtype.
    """

    def __init__(
        self,
        evictor: Evictor,
        index: int,
        limit: ByteLimit | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__()
        self.evictor = evictor
        self.index = index
        self.limit = limit
        self.codec = codec
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.valid_seen: Tensor | None = None  # (B,) int64 on the CPU, tokens but padding
        self.slots: Slots | PackedSlots | None = None
        self.position: Tensor | None = None  # (B, K, S) int32, FREE where no entry is
        self.score: Tensor | None = None  # (B, K, S) float32, of cumulative policies
        self.vacant: Tensor | None = None  # (B, K, 1) int64, slot of the next token
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        shape = batch, heads, key_states.shape[-1], value_states.shape[-1], dtype, self.device
        self.slots = Slots(*shape) if self.codec is None else PackedSlots(*shape, self.codec)
        self.valid_seen = torch.zeros(batch, dtype=torch.int64)
        empty = torch.empty(batch, heads, 0, device=self.device)
        self.position = empty.int()
        self.score = empty.float() if self.evictor.cumulative else None
        self.vacant = torch.zeros(batch, heads, 1, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def growing(self) -> contextlib.AbstractContextManager[None]:
        """Around what adds tokens: over the byte limit, all layers are as before the step."""
        return contextlib.nullcontext() if self.limit is None else self.limit.step(self)

    def arrive(self, key: Tensor, value: Tensor, valid: Tensor | None) -> Arrivals:
        """Counts new tokens.

        Args:
            key: (B, K, T, D), rotated.
            value: (B, K, T, Dv).
            valid: (B, T) bool, False at padding; None = there is none.

        Raises:
            ValueError: other shapes or another dtype than in earlier calls.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self._check(key)
        assert self.valid_seen is not None
        batch, count = len(self.valid_seen), key.shape[2]
        real = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid.cpu()
        new = arrivals(self.evictor, self.valid_seen, real)
        self.seen += count
        self.valid_seen = new.seen
        return new

    def add(self, key: Tensor, value: Tensor, new: Arrivals) -> None:
        """Puts one token of each request into the slot that is free.

        Args:
            key: (B, K, 1, D), rotated, finite at padding.
            value: (B, K, 1, Dv), finite at padding.
            new: T = 1.
        """
        assert self.slots is not None and self.position is not None and self.vacant is not None
        # Padding is written as well, to a slot that stays free.
        writes = new.evicts | (new.position < 0)
        held = held_count(self.evictor, new.seen) + writes[:, 0]
        width = max(int(held.max()), self.position.shape[2])
        arrived = new.position.to(self.device)[:, None].expand_as(self.vacant)
        self.slots.cover(width, self._most())
        self.slots.put(self.vacant, key, value, arrived)
        missing = width - self.position.shape[2]
        position = F.pad(self.position, (0, missing), value=FREE)
        self.position = position.scatter(-1, self.vacant, arrived)
        if self.score is not None:
            self.score = F.pad(self.score, (0, missing)).scatter(-1, self.vacant, 0.0)

    def vacate(self, victim: Tensor | None, new: Arrivals) -> None:
        """Says where the next token goes, after `add`.

        Args:
            victim: (B, K, 1) int64, slots that were freed; None = none was.
            new: what `add` was given.
        """
        assert self.vacant is not None
        behind = held_count(self.evictor, new.seen).to(self.device)[:, None, None]
        if victim is not None:
            behind = torch.where(new.evicts.to(self.device)[..., None], victim, behind)
        padding = (new.position < 0).to(self.device)[..., None]
        self.vacant = torch.where(padding, self.vacant, behind)

    def fill(self, columns: tuple[Tensor, ...], position: Tensor, score: Tensor | None) -> None:
        """Makes these entries all there are; those of a request come before its free slots.

        Args:
            columns: (B, K, S, ...), finite throughout; see `Slots.columns`.
            position: (B, K, S) int32.
            score: (B, K, S) float32, for cumulative policies.
        """
        assert self.slots is not None and self.valid_seen is not None
        self.slots.fill(columns, position, self.valid_seen, self._most())
        self.position, self.score = position, score
        self.vacant = (position >= 0).sum(-1, keepdim=True)

    def read(self) -> Pair:
        """Keys (B, K, S, D) and values (B, K, S, Dv) of the slots in use, for the newest token."""
        assert self.slots is not None and self.position is not None and self.valid_seen is not None
        return self.slots.read(self.position, self.valid_seen)

    def columns(self, new: Arrivals) -> tuple[Tensor, ...]:
        """All there is to know of the slots in use before `new`; see `Slots.columns`."""
        assert self.slots is not None and self.position is not None
        return self.slots.columns(self.position, new.seen - (new.position >= 0).sum(1))

    def _most(self) -> int | None:
        """Slots that a head ever needs: the entries and the token that comes before an eviction."""
        return None if self.evictor.budget is None else self.evictor.budget + 1

    def _check(self, key: Tensor) -> None:
        assert self.slots is not None
        held = (*self.slots.dims, self.dtype)
        got = (key.shape[0], key.shape[1], key.shape[3], key.dtype)
        if got != held:
            refuse_other(held, got)

    @property
    def num_requests(self) -> int:
        """B, 0 before the first token."""
        return 0 if self.valid_seen is None else len(self.valid_seen)

    def entries(self) -> Tensor:
        """Entries each head holds, (B, K) int64."""
        if self.position is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        return (self.position >= 0).sum(-1)

    def tokens_seen(self) -> Tensor:
        """Tokens that are not padding, (B, K) int64."""
        if self.valid_seen is None or self.position is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        return self.valid_seen.to(self.device)[:, None].expand(self.position.shape[:2])

    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry of one head, 0 before the first token."""
        return 0 if self.slots is None else self.slots.entry_nbytes()

    def kept_nbytes(self) -> int:
        """Bytes of the entries: keys, values, positions and scores that go on."""
        if self.slots is None:
            return 0
        beside = sum(tensor.element_size() for tensor in (self.position, self.score)
                     if tensor is not None)  # fmt: skip
        count = int(self.entries().sum())
        return self.slots.kept_nbytes(count) + count * beside

    def nbytes(self) -> int:
        """Bytes of all tensors held, free slots included."""
        return self._beside_nbytes() + (0 if self.slots is None else self.slots.nbytes())

    def nbytes_at(self, rows: Tensor) -> int:
        """Bytes of all tensors held once the batch is that at `rows` (n,) int64."""
        if self.slots is None:
            return 0
        beside = self._beside_nbytes() * len(rows) // max(self.num_requests, 1)
        return beside + self.slots.nbytes_at(len(rows), self._width(rows))

    def _beside_nbytes(self) -> int:
        """Bytes of what is held beside keys and values."""
        parts = (self.position, self.score, self.vacant, self.valid_seen)
        return tensor_nbytes([tensor for tensor in parts if tensor is not None])

    def reserve(self, tokens: int) -> None:
        """Takes slots for `tokens` further steps.

        Raises:
            ValueError: over the byte limit.
        """
        assert self.slots is not None and self.valid_seen is not None
        most = held_count(self.evictor, self.valid_seen + tokens)
        self.slots.cover(int(most.max()) + 1, self._most())

    def tensors(self) -> dict[str, Tensor]:
        """The state by flat names, as `load_tensors` takes it."""
        if self.valid_seen is None or self.position is None or self.vacant is None:
            return {}
        assert self.slots is not None
        found = self.slots.tensors(self.position) | {
            "position": self.position, "vacant": self.vacant, "valid_seen": self.valid_seen,
        }  # fmt: skip
        return found if self.score is None else found | {"score": self.score}

    def load_tensors(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Replaces the whole state by what `tensors` gave and the number of tokens seen."""
        self._clear()
        if not tensors:
            return
        self.lazy_initialization(tensors["slot_key"], tensors["slot_value"])
        assert self.slots is not None
        self.slots.load(tensors, self._most())
        self.position, self.score = tensors["position"], tensors.get("score")
        self.vacant, self.valid_seen = tensors["vacant"], tensors["valid_seen"].cpu()
        self.seen = seen

    def in_place(self) -> dict[str, Any]:
        """Nothing but free slots changes in place."""
        return {}

    def mark(self) -> Any:
        """Where `rewind` can go back to."""
        return None if self.slots is None else self.slots.mark()

    def rewind(self, mark: Any) -> None:
        """Undoes what was done to keys and values since `mark`."""
        if self.slots is not None:
            self.slots.rewind(mark)

    def _width(self, rows: Tensor) -> int:
        """Slots that the requests at `rows` use."""
        assert self.position is not None
        used = (self.position.index_select(0, rows.to(self.device)) >= 0).any(1).any(0).nonzero()
        return int(used.max()) + 1 if len(used) else 0

    def _select(self, rows: Tensor) -> None:
        if self.slots is None:
            return
        assert self.position is not None and self.vacant is not None
        assert self.valid_seen is not None
        width, here = self._width(rows), rows.to(self.device)
        self.slots.select(here, width)
        self.position = self.position[..., :width].index_select(0, here)
        if self.score is not None:
            self.score = self.score[..., :width].index_select(0, here)
        self.vacant = self.vacant.index_select(0, here)
        self.valid_seen = self.valid_seen.index_select(0, rows.cpu())

    def _move(self, device: torch.device | str) -> None:
        if self.slots is None:
            return
        self.slots.to(device)
        for name in ("position", "score", "vacant"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Not possible here: eviction needs the attention of the folded layer."""
        raise TypeError(
            "an evicting cache layer can't take dense keys and values: the attention layer that "
            "called update() is not folded. Call cachefold.fold(model, policy) before using this "
            "cache, or use a DynamicCache with the dense model"
        )
