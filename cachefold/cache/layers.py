"""One layer of a folding cache: closed entries, the open entry and the ring of newest tokens.

Legend: B batch, K kv heads, T new tokens, N stream tokens, S closed entries, D head dim, R rotary
dim (<= D). A token waits `delay` tokens in the ring; when it leaves, its decision is carried out:
it merges into the open entry (alpha 1) or closes that entry and opens the next (alpha 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cachefold.cache.stream import Stream, Tokens, clean, concatenate
from cachefold.core.decisions import constrain
from cachefold.core.merging import running_means
from cachefold.core.rotary import rotate

# Closed-entry buffers grow by multiples of this many entries.
CHUNK = 64


class FoldedLayer(CacheLayerMixin):
    """Folds the tokens of one attention layer. For inference: what it stores carries no gradient.

    Args:
        delay: tokens kept exact.
        window: most tokens an entry averages; None = no bound.

    Raises:
        ValueError: delay or window out of range.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, delay: int, window: int | None = None) -> None:
        super().__init__()
        if delay < 0 or (window is not None and window < 1):
            raise ValueError(
                f"delay must be >= 0 and window >= 1 or None; got delay={delay}, window={window}"
            )
        self.delay = delay
        self.window = window
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.valid_seen: Tensor | None = None  # (B,) int64, tokens that are not padding
        self.closed_key: Tensor | None = None  # (B, K, capacity, D), rotated
        self.closed_value: Tensor | None = None  # (B, K, capacity, Dv)
        self.lengths: Tensor | None = None  # (B, K) int64, closed entries
        self.tail: Tokens | None = None  # the open entry
        self.ring: Tokens | None = None  # the newest tokens, exact
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.closed_key = key_states.new_empty(batch, heads, 0, key_states.shape[-1])
        self.closed_value = value_states.new_empty(batch, heads, 0, value_states.shape[-1])
        self.lengths = torch.zeros(batch, heads, dtype=torch.int64, device=self.device)
        self.valid_seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def extend(self, new: Tokens, key_scale: Tensor | None = None) -> Stream:
        """Adds tokens: returns what they may attend to, then folds what leaves the ring.

        Args:
            new: T >= 1 tokens with hard decisions; `cos` and `sin` may have batch 1, `alpha` is
                forced to 0 where there is nothing to merge into, padding is never stored as an
                entry.
            key_scale: (D,) factors on the keys of entries that close, after their rotation; the
                caller does the same to the keys of the stream.

        Returns:
            The stream, with the entries closed before this call.

        Raises:
            ValueError: other shapes or another dtype than in earlier calls.
        """
        if not self.is_initialized:
            self.lazy_initialization(new.key, new.value)
        self._check(new)
        assert self.valid_seen is not None
        tokens = concatenate(
            [part for part in (self.tail, self.ring, clean(new)) if part is not None]
        )
        tokens = replace(tokens, alpha=constrain(tokens.alpha, tokens.valid))
        stream, weight = self._stream(tokens, new.key.dtype, new.value.dtype)
        self._commit(stream, weight, key_scale)
        self.seen += new.valid.shape[1]
        self.valid_seen = self.valid_seen + new.valid.sum(1)
        return stream

    def _stream(
        self, tokens: Tokens, key_dtype: torch.dtype, value_dtype: torch.dtype
    ) -> tuple[Stream, Tensor]:
        """Adds running means and closed entries; also their weights (B, K, N)."""
        assert self.lengths is not None
        assert self.closed_key is not None and self.closed_value is not None
        mean_key, mean_value, weight = running_means(
            tokens.key, tokens.value, tokens.alpha, tokens.omega, self.window
        )
        slots = torch.arange(self.closed_key.shape[2], device=self.device)
        stream = Stream(
            **{field.name: getattr(tokens, field.name) for field in fields(Tokens)}
            | {"key": tokens.key.to(key_dtype), "value": tokens.value.to(value_dtype)},
            merged_key=mean_key,
            merged_value=mean_value,
            num_prefix=0 if self.tail is None else self.tail.valid.shape[1],
            closed_key=self.closed_key,
            closed_value=self.closed_value,
            closed_mask=slots < self.lengths[..., None],
        )
        return stream, weight

    def _check(self, new: Tokens) -> None:
        assert self.closed_key is not None
        batch, heads, _, dim = self.closed_key.shape
        held = (batch, heads, dim, self.closed_key.dtype)
        got = (new.key.shape[0], new.key.shape[1], new.key.shape[3], new.key.dtype)
        if got != held:
            names = ("batch", "kv heads", "head dim", "dtype")
            odd = [f"{n} {h} (got {g})" for n, h, g in zip(names, held, got, strict=True) if h != g]
            raise ValueError(
                f"this cache layer holds {', '.join(odd)}; a cache goes on only with the model, "
                "the dtype and the batch it was filled by: make a new one otherwise"
            )

    def _commit(self, stream: Stream, weight: Tensor, key_scale: Tensor | None) -> None:
        """Closes entries whose successor appended; carries the open entry and the ring on."""
        num_tokens = stream.valid.shape[1]
        end = max(num_tokens - self.delay, 0)  # tokens before `end` have left the ring
        self.ring = stream.slice(end, num_tokens) if end < num_tokens else None
        if end == 0:
            return
        self._close(stream, max(stream.num_prefix - 1, 0), end - 1, key_scale)
        if self.window is not None:
            self.tail = stream.slice(max(end - self.window, 0), end)
            return
        means = replace(stream.tokens(), key=stream.merged_key, value=stream.merged_value)
        tail = replace(means, alpha=torch.zeros_like(stream.alpha), omega=weight)
        self.tail = tail.slice(end - 1, end)

    def _close(self, stream: Stream, start: int, stop: int, key_scale: Tensor | None) -> None:
        """Appends the entries that end at a token in [start, stop) to the buffers."""
        closes = stream.alpha[:, :, start + 1 : stop + 1] < 0.5
        closes = closes & stream.valid[:, None, start:stop]
        batch, head, token = closes.nonzero(as_tuple=True)
        if not len(token):
            return
        assert self.lengths is not None
        assert self.closed_key is not None and self.closed_value is not None
        slots = self.lengths[..., None] + closes.cumsum(-1) - 1
        lengths = self.lengths + closes.sum(-1)
        self._grow(int(lengths.max()))
        slot = slots[batch, head, token]
        token = token + start
        # Rotation in the dtype of the cache, as the exact keys of the model are rotated.
        keys = stream.merged_key[batch, head, token].detach().to(self.dtype)
        cos, sin = stream.cos[batch, token], stream.sin[batch, token]
        keys = rotate(keys[None, None], cos[None], sin[None])[0, 0]
        keys = keys if key_scale is None else keys * key_scale
        self.closed_key[batch, head, slot] = keys.to(self.dtype)
        values = stream.merged_value[batch, head, token].detach()
        self.closed_value[batch, head, slot] = values.to(self.closed_value.dtype)
        self.lengths = lengths

    def _grow(self, needed: int) -> None:
        assert self.closed_key is not None and self.closed_value is not None
        missing = needed - self.closed_key.shape[2]
        if missing <= 0:
            return
        extra = -(-missing // CHUNK) * CHUNK
        for name in ("closed_key", "closed_value"):
            old = getattr(self, name)
            shape = (*old.shape[:2], extra, old.shape[3])
            setattr(self, name, torch.cat([old, old.new_zeros(shape)], 2))

    def entries(self) -> Tensor:
        """Entries each head holds, (B, K) int64: closed, the open one, and the ring."""
        if self.lengths is None:
            return torch.zeros(0, 0, dtype=torch.int64)
        count = self.lengths
        if self.tail is not None:
            count = count + self.tail.valid[:, -1:]
        return count if self.ring is None else count + self.ring.valid.sum(1, keepdim=True)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by a flat name, as `load_tensors` takes them."""
        names = ("closed_key", "closed_value", "lengths", "valid_seen")
        found = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        for run in ("tail", "ring"):
            tokens = getattr(self, run)
            for field in fields(Tokens) if tokens is not None else ():
                found[f"{run}.{field.name}"] = getattr(tokens, field.name)
        return found

    def load_tensors(self, tensors: dict[str, Tensor], seen: int) -> None:
        """Replaces the whole state by what `tensors` gave and the number of tokens seen."""
        self._clear()
        if not tensors:
            return
        self.lazy_initialization(tensors["closed_key"], tensors["closed_value"])
        for name in ("closed_key", "closed_value", "lengths", "valid_seen"):
            setattr(self, name, tensors[name])
        for run in ("tail", "ring"):
            if f"{run}.key" in tensors:
                parts = [tensors[f"{run}.{field.name}"] for field in fields(Tokens)]
                setattr(self, run, Tokens(*parts))
        self.seen = seen

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        changed = {name: function(tensor) for name, tensor in self.tensors().items()}
        device = self.device if self.is_initialized else None
        self.load_tensors(changed, self.seen)
        if device is not None:
            self.device = device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Not possible here: folding needs the decisions and unrotated keys of `extend`."""
        raise TypeError(
            "a folded cache layer can't take dense keys and values: the attention layer that "
            "called update() is not folded. Call cachefold.fold(model, policy) before using this "
            "cache, or use a DynamicCache with the dense model"
        )

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
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves the layer back to its device."""
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Picks sequences for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences at `indices` (positions or a mask)."""
        self._map(lambda tensor: tensor[indices.to(tensor.device), ...])

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible: a merged token can't be taken out of its entry."""
        raise ValueError(
            f"a folded cache can't drop its last tokens (crop({tokens_to_remove})): merged tokens "
            "can't be taken out of their entry. Turn off assisted or prompt-lookup decoding, or "
            "copy the cache (copy.deepcopy) before the tokens that you may want to undo"
        )
