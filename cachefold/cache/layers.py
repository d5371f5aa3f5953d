"""One layer of a folding cache: closed entries, the open entry and the ring of newest tokens.

Legend: B batch, K kv heads, T new tokens, N stream tokens, S closed entries, D head dim, R rotary
dim (<= D). A token waits `delay` tokens in the ring; when it leaves, its decision is carried out:
it merges into the open entry (alpha 1) or closes that entry and opens the next (alpha 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from cachefold.cache.codecs import Codec
from cachefold.cache.compressed import tensor_nbytes
from cachefold.cache.entries import PagedEntries
from cachefold.cache.ring import STEPS_AHEAD, closings, to_step
from cachefold.cache.state import FoldedState
from cachefold.cache.stream import (
    Finish,
    Stream,
    arrivals_that_close,
    clean,
    concatenate,
    open_entries,
    shifted,
)
from cachefold.core.decisions import constrain
from cachefold.core.merging import running_means, running_sizes
from cachefold.core.tokens import Tokens

if TYPE_CHECKING:
    from cachefold.cache.limit import ByteLimit


class FoldedLayer(FoldedState):
    """Folds the tokens of one attention layer. For inference: what it stores carries no gradient.

    Args:
        delay: tokens kept exact.
        window: most tokens an entry averages; None = no bound.
        page_size: entries per page, 16 or 32.
        limit: on the bytes of the whole cache; None = no limit.
        codec: packs closed entries; None = they keep their dtype.

    Raises:
        ValueError: delay, window or page size out of range.
    """

    def __init__(
        self,
        delay: int,
        window: int | None = None,
        page_size: int = 16,
        limit: ByteLimit | None = None,
        codec: Codec | None = None,
    ) -> None:
        super().__init__(page_size, codec)
        if delay < 0 or (window is not None and window < 1):
            raise ValueError(
                f"delay must be >= 0 and window >= 1 or None; got delay={delay}, window={window}"
            )
        self.delay = delay
        self.window = window
        self.limit = limit

    def extend(
        self, new: Tokens, key_scale: Tensor | None = None, size_weight: Tensor | None = None
    ) -> Stream:
        """Adds tokens: returns what they may attend to, then folds what leaves the ring.

        Args:
            new: T >= 1 tokens with hard decisions; `cos` and `sin` may have batch 1, `alpha` is
                forced to 0 where there is nothing to merge into, padding is never stored as an
                entry.
            key_scale: (D,) factors on the keys of entries that close, after their rotation; the
                caller does the same to the keys of the stream.
            size_weight: (K,), entries that close get `merging.size_bias` with it; None, when `new`
                has no sizes: no bias.

        Returns:
            What the new tokens may attend to.

        Raises:
            ValueError: other shapes or another dtype than in earlier calls, or over the byte limit
                of the cache, which then is in all its layers as it was before this step.
        """
        finish = Finish(key_scale, size_weight)
        if self.limit is None:
            return self._extend(new, finish)
        with self.limit.step(self):
            return self._extend(new, finish)

    def _extend(self, new: Tokens, finish: Finish) -> Stream:
        if not self.is_initialized:
            self.has_sizes = new.size is not None
            self.lazy_initialization(new.key, new.value)
        self._check(new)
        assert self.valid_seen is not None and self.closed is not None
        self.ring, self.turn, self.ahead = self.ordered_ring(), None, 0
        tokens = concatenate(
            [part for part in (self.tail, self.ring, clean(new)) if part is not None]
        )
        tokens = replace(tokens, alpha=constrain(tokens.alpha, tokens.valid))
        key, value, weight = running_means(
            tokens.key, tokens.value, tokens.alpha, tokens.omega, self.window
        )
        size = None if tokens.size is None else running_sizes(tokens.alpha, tokens.size)
        means = replace(tokens, key=key, value=value, omega=weight, size=size)
        closes = arrivals_that_close(tokens, 0 if self.tail is None else self.tail.valid.shape[1])
        before = self.closed.lengths
        read = self._commit(tokens, means, closes, finish)
        self.seen += new.valid.shape[1]
        self.valid_seen = self.valid_seen + new.valid.sum(1)
        counts = before[..., None] + closes.cumsum(-1)
        return self._stream(tokens, means, counts, new, read)

    @property
    def can_step(self) -> bool:
        """Whether `step` takes the next token in place.

        Not with a window, which needs the tokens of the open entry, nor into packed pages.
        """
        return self.seen > 0 and self.window in (None, 1) and self.codec is None

    def step(
        self, new: Tokens, run: Callable[[FoldedLayer], Tensor], padded: bool = True
    ) -> Tensor:
        """Adds one token per request in place, for the price of few torch operations.

        Args:
            new: T = 1 token with hard decisions, no NaN at padding; `cos` and `sin` may have
                batch 1.
            run: folds the token into this layer and attends: changes ring, turn, tail, lengths
                and pages as `attention.call.StepCall` says.
            padded: whether there may be padding among the new tokens.

        Returns:
            What `run` returned.

        Raises:
            ValueError: as for `extend`; before anything changed in place.
        """
        # A compiled step takes no pages, so that it can't go over a limit.
        if self.limit is None or torch.compiler.is_compiling():
            return self._step(new, run, padded)
        with self.limit.step(self):
            return self._step(new, run, padded)

    def _step(self, new: Tokens, run: Callable[[FoldedLayer], Tensor], padded: bool) -> Tensor:
        assert self.can_step and self.valid_seen is not None
        self._check(new)
        if not self.ahead:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "a compiled step can't take pages, and those of this cache are used up; call "
                    "cache.reserve(tokens) before the first compiled step, for all of them"
                )
            self._look_ahead()
        if self.window == 1:
            assert self.tail is not None
            # An entry without weight leaves nothing of itself in what is merged into it.
            self.tail.omega.zero_()
        out = run(self)
        self.ahead -= 1
        self.seen += 1
        self.valid_seen.add_(new.valid[:, 0] if padded else 1)
        return out

    def reserve(self, tokens: int) -> None:
        """Takes pages for `tokens` further steps, whatever they decide.

        Raises:
            ValueError: over the byte limit, or with a codec.
        """
        if self.codec is not None:
            raise ValueError(
                "packed entries take no steps in place, so that no pages can be reserved for them; "
                "leave reserve() out, or make the cache without a codec"
            )
        if self.can_step:
            self._turn_circular()
        assert self.closed is not None
        self._cover(self.closed.lengths + tokens)
        self.ahead = max(self.ahead, tokens) if self.can_step else 0

    def _look_ahead(self) -> None:
        """Takes the pages that the next steps need: the tokens that leave next have decided."""
        self._turn_circular()
        assert self.ring is not None and self.tail is not None and self.turn is not None
        assert self.closed is not None
        steps = min(STEPS_AHEAD, max(self.delay, 1))
        self._cover(self.closed.lengths + closings(self.ring, self.tail, self.turn, steps))
        self.ahead = steps

    # Steps change these tensors in place, in whatever mode that happens.
    @torch.inference_mode(False)
    def _turn_circular(self) -> None:
        """Gives the layer tensors of its own that steps may change in place."""
        if self.turn is not None:
            return
        assert self.closed is not None and self.valid_seen is not None
        self.ring, self.tail = to_step(self.ring, self.tail, self.delay)
        self.turn = torch.zeros((), dtype=torch.int64, device=self.closed.lengths.device)
        self.closed.lengths = self.closed.lengths.clone()
        self.valid_seen = self.valid_seen.clone()

    def _cover(self, lengths: Tensor) -> None:
        """Takes pages for `lengths` (B, K) entries, if the limit allows."""
        assert isinstance(self.closed, PagedEntries)
        spare = None
        if self.limit is not None:
            needed = self.closed.nbytes_with(lengths) + self._beside_nbytes()
            spare = self.limit.spare(self, needed)
        self.closed.cover(lengths, spare)

    def _stream(
        self, tokens: Tokens, means: Tokens, counts: Tensor, new: Tokens,
        read: tuple[Tensor, Tensor],
    ) -> Stream:  # fmt: skip
        """What the new tokens see: by `counts` (B, K, N), entries closed when a token arrived."""
        num_tokens, num_new = tokens.valid.shape[1], new.valid.shape[1]
        first = num_tokens - num_new
        opened = open_entries(means, first - self.delay, num_new)
        exact = tokens.narrow(max(first - max(self.delay - 1, 0), 0), num_tokens)
        of_key, of_value = new.key.dtype, new.value.dtype
        return Stream(
            exact=replace(exact, key=exact.key.to(of_key), value=exact.value.to(of_value)),
            open=replace(opened, key=opened.key.to(of_key), value=opened.value.to(of_value)),
            visible=shifted(counts, 2, first - self.delay, num_new),
            pages=read[0],
            table=read[1],
        )

    def _commit(
        self, tokens: Tokens, means: Tokens, closes: Tensor, finish: Finish
    ) -> tuple[Tensor, Tensor]:
        """Stores the entries that closed; carries the open entry and the ring on.

        Returns:
            Pages and table with all of these entries.
        """
        num_tokens = tokens.valid.shape[1]
        end = max(num_tokens - self.delay, 0)  # tokens before `end` have left the ring
        ring = tokens.slice(end, num_tokens) if end < num_tokens else None
        if ring is not None and self.dtype != ring.key.dtype:  # beside sums in float32
            ring = replace(ring, key=ring.key.to(self.dtype), value=ring.value.to(self.dtype))
        tail = self._open_entry(tokens, means, end)
        closed = closes[:, :, 1:end]
        read = self._close(means, closed, finish, self._spare_nbytes(closed, ring, tail))
        self.ring, self.tail = ring, tail
        return read

    def _open_entry(self, tokens: Tokens, means: Tokens, end: int) -> Tokens | None:
        """What is carried of the entry that is open before token `end`."""
        if end == 0:
            return self.tail
        if self.window is not None and self.window > 1:
            return tokens.slice(max(end - self.window, 0), end)
        return replace(means, alpha=torch.zeros_like(means.alpha)).slice(end - 1, end)

    def _spare_nbytes(self, closed: Tensor, ring: Tokens | None, tail: Tokens | None) -> int | None:
        """Bytes that the limit allows for spare pages; None = no limit.

        Raises:
            ValueError: over the limit even without spare pages.
        """
        if self.limit is None:
            return None
        assert self.closed is not None and self.valid_seen is not None
        rest = [tensor for run in (ring, tail) if run is not None for tensor in run.tensors()]
        needed = self.closed.nbytes_with(self.closed.lengths + closed.sum(-1))
        return self.limit.spare(self, needed + tensor_nbytes([*rest, self.valid_seen]))

    def _close(
        self, means: Tokens, closed: Tensor, finish: Finish, spare_nbytes: int | None
    ) -> tuple[Tensor, Tensor]:
        """Stores the entries that end at a token t with `closed` (B, K, m) True."""
        assert self.closed is not None
        ends = closed.nonzero(as_tuple=True)
        if not len(ends[0]):
            return self.closed.read()
        keys = finish.keys(means, ends, self.dtype)
        values, mass = (x[ends].detach() for x in (means.value, means.omega))
        return self.closed.append(closed, keys, values, spare_nbytes, mass)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Not possible here: folding needs the decisions and unrotated keys of `extend`."""
        raise TypeError(
            "a folded cache layer can't take dense keys and values: the attention layer that "
            "called update() is not folded. Call cachefold.fold(model, policy) before using this "
            "cache, or use a DynamicCache with the dense model"
        )
