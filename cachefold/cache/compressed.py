"""What every compressing layer of a cache tells, and what transformers asks of it.

Legend: B batch, K kv heads.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from cachefold.cache.limit import ByteLimit


class CompressedLayer(CacheLayerMixin):
    """A layer that keeps fewer entries than it saw tokens, in a storage of its own."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    seen: int
    """Tokens seen, padding included."""
    limit: ByteLimit | None
    """On the bytes of the whole cache; None = no limit."""

    @property
    @abstractmethod
    def num_requests(self) -> int:
        """B, 0 before the first token."""

    @abstractmethod
    def entries(self) -> Tensor:
        """Entries each head holds, (B, K) int64; (0, 0) before the first token."""

    @abstractmethod
    def tokens_seen(self) -> Tensor:
        """Tokens that are not padding, (B, K) int64; (0, 0) before the first token."""

    @abstractmethod
    def entry_nbytes(self) -> int:
        """Bytes of the key and value of one entry of one head, 0 before the first token."""

    @abstractmethod
    def kept_nbytes(self) -> int:
        """Bytes of what is kept, spare capacity left out."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors held, spare capacity included."""

    @abstractmethod
    def nbytes_at(self, rows: Tensor) -> int:
        """Bytes of all tensors held once the batch is that at `rows` (n,) int64."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Takes the memory for `tokens` further steps, whatever is decided.

        Raises:
            ValueError: over the byte limit.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The state by flat names, as `load_tensors` takes it."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Replaces the whole state by what `tensors` gave and the number of tokens seen."""

    @abstractmethod
    def in_place(self) -> dict[str, Any]:
        """Copies of the attributes whose tensors a step changes in place, by name."""

    @abstractmethod
    def mark(self) -> Any:
        """Where `rewind` can go back to, what the attributes of the layer don't say."""

    @abstractmethod
    def rewind(self, mark: Any) -> None:
        """Undoes what was added since `mark`, when the attributes are as they were then."""

    @abstractmethod
    def _clear(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def _select(self, rows: Tensor) -> None:
        """Makes the sequences at `rows` (n,) int64 the batch; repeats are copied."""

    @abstractmethod
    def _move(self, device: torch.device | str) -> None:
        """Moves what is held."""

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
        if self.is_initialized:
            self._move(self.device)

    def reset(self) -> None:
        """Forgets everything and frees what was held."""
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

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible: see `refuse_crop`."""
        refuse_crop(tokens_to_remove)


def refuse_crop(tokens_to_remove: int) -> NoReturn:
    """Tokens can't be taken out again.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"a folded cache can't drop its last tokens (crop({tokens_to_remove})): what was merged or "
        "evicted for them doesn't come back. Turn off assisted or prompt-lookup decoding, or copy "
        "the cache (copy.deepcopy) before the tokens that you may want to undo"
    )


def refuse_other(held: tuple[Any, ...], got: tuple[Any, ...]) -> NoReturn:
    """Keys that don't go with those held.

    Raises:
        ValueError: always.
    """
    names = ("batch", "kv heads", "head dim", "dtype")
    odd = [f"{n} {h} (got {g})" for n, h, g in zip(names, held, got, strict=True) if h != g]
    raise ValueError(
        f"this cache layer holds {', '.join(odd)}; a cache goes on only with the model, the dtype "
        "and the batch it was filled by: make a new one otherwise"
    )


def tensor_nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storage of tensors that share none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
