"""One layer of a folding cache: closed entries, the open entry and the ring of newest tokens.

Legend: B batch, K kv heads, T new tokens, N stream tokens, S closed entries, D head dim, R rotary
dim (<= D). A token waits `delay` tokens in the ring; when it leaves, its decision is carried out:
it merges into the open entry (alpha 1) or closes that entry and opens the next (alpha 0).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cachefold.cache.state import FoldedState, tensor_nbytes
from cachefold.cache.stream import Stream, Tokens, clean, concatenate
from cachefold.core.decisions import constrain
from cachefold.core.merging import running_means
from cachefold.core.rotary import rotate

if TYPE_CHECKING:
    from cachefold.cache.limit import ByteLimit


class FoldedLayer(FoldedState):
    """Folds the tokens of one attention layer. For inference: what it stores carries no gradient.

    Args:
        delay: tokens kept exact.
        window: most tokens an entry averages; None = no bound.
        page_size: entries per page, 16 or 32.
        limit: on the bytes of the whole cache; None = no limit.

    Raises:
        ValueError: delay, window or page size out of range.
    """

    def __init__(
        self,
        delay: int,
        window: int | None = None,
        page_size: int = 16,
        limit: ByteLimit | None = None,
    ) -> None:
        super().__init__(page_size)
        if delay < 0 or (window is not None and window < 1):
            raise ValueError(
                f"delay must be >= 0 and window >= 1 or None; got delay={delay}, window={window}"
            )
        self.delay = delay
        self.window = window
        self.limit = limit

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
            ValueError: other shapes or another dtype than in earlier calls, or over the byte limit
                of the cache, which then is in all its layers as it was before this step.
        """
        if self.limit is None:
            return self._extend(new, key_scale)
        with self.limit.step(self):
            return self._extend(new, key_scale)

    def _extend(self, new: Tokens, key_scale: Tensor | None) -> Stream:
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
        assert self.closed is not None
        mean_key, mean_value, weight = running_means(
            tokens.key, tokens.value, tokens.alpha, tokens.omega, self.window
        )
        closed_key, closed_value, closed_mask = self.closed.padded()
        stream = Stream(
            **{field.name: getattr(tokens, field.name) for field in fields(Tokens)}
            | {"key": tokens.key.to(key_dtype), "value": tokens.value.to(value_dtype)},
            merged_key=mean_key,
            merged_value=mean_value,
            num_prefix=0 if self.tail is None else self.tail.valid.shape[1],
            closed_key=closed_key,
            closed_value=closed_value,
            closed_mask=closed_mask,
        )
        return stream, weight

    def _check(self, new: Tokens) -> None:
        assert self.closed is not None
        held = (*self.closed.lengths.shape, self.closed.pool.key_dim, self.dtype)
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
        ring = stream.slice(end, num_tokens) if end < num_tokens else None
        tail = self._open_entry(stream, weight, end)
        start = max(stream.num_prefix - 1, 0)
        stop = max(end - 1, start)
        closes = stream.alpha[:, :, start + 1 : stop + 1] < 0.5
        closes = closes & stream.valid[:, None, start:stop]
        self._close(stream, start, closes, key_scale, self._spare_nbytes(closes, ring, tail))
        self.ring, self.tail = ring, tail

    def _open_entry(self, stream: Stream, weight: Tensor, end: int) -> Tokens | None:
        """What is carried of the entry that is open before token `end`."""
        if end == 0:
            return self.tail
        if self.window is not None:
            return stream.slice(max(end - self.window, 0), end)
        means = replace(stream.tokens(), key=stream.merged_key, value=stream.merged_value)
        tail = replace(means, alpha=torch.zeros_like(stream.alpha), omega=weight)
        return tail.slice(end - 1, end)

    def _spare_nbytes(self, closes: Tensor, ring: Tokens | None, tail: Tokens | None) -> int | None:
        """Bytes that the limit allows for spare pages; None = no limit.

        Raises:
            ValueError: over the limit even without spare pages.
        """
        if self.limit is None:
            return None
        assert self.closed is not None and self.valid_seen is not None
        rest = [tensor for run in (ring, tail) if run is not None for tensor in run.tensors()]
        needed = self.closed.nbytes_with(self.closed.lengths + closes.sum(-1))
        return self.limit.spare(self, needed + tensor_nbytes([*rest, self.valid_seen]))

    def _close(
        self,
        stream: Stream,
        start: int,
        closes: Tensor,
        key_scale: Tensor | None,
        spare_nbytes: int | None,
    ) -> None:
        """Stores the entries that end at a token start + m with `closes` (B, K, m) True."""
        batch, head, token = closes.nonzero(as_tuple=True)
        if not len(token):
            return
        assert self.closed is not None
        token = token + start
        # Rotation in the dtype of the cache, as the exact keys of the model are rotated.
        keys = stream.merged_key[batch, head, token].detach().to(self.dtype)
        cos, sin = stream.cos[batch, token], stream.sin[batch, token]
        keys = rotate(keys[None, None], cos[None], sin[None])[0, 0]
        keys = keys if key_scale is None else keys * key_scale
        values = stream.merged_value[batch, head, token].detach()
        self.closed.append(closes, keys, values, spare_nbytes)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Not possible here: folding needs the decisions and unrotated keys of `extend`."""
        raise TypeError(
            "a folded cache layer can't take dense keys and values: the attention layer that "
            "called update() is not folded. Call cachefold.fold(model, policy) before using this "
            "cache, or use a DynamicCache with the dense model"
        )

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible: a merged token can't be taken out of its entry."""
        raise ValueError(
            f"a folded cache can't drop its last tokens (crop({tokens_to_remove})): merged tokens "
            "can't be taken out of their entry. Turn off assisted or prompt-lookup decoding, or "
            "copy the cache (copy.deepcopy) before the tokens that you may want to undo"
        )
