"""A batch of texts on its way through a model and the cache it fills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.evaluation.footprint import Footprint, measure


class Reading:
    """Feeds padded texts to a model, always through one cache.

    Args:
        model: dense or folded.
        cache: empty, of the kind the model fills.
        options: further arguments of the model's forward.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Any, options: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.options = options or {}
        self.valid: Tensor | None = None
        """(B, T) bool of all tokens fed so far."""

    def feed(self, ids: Tensor, valid: Tensor, keep: int) -> Tensor:
        """Feeds new tokens.

        Args:
            ids: (B, T) token ids.
            valid: (B, T) bool, False at padding, which stands before a text.
            keep: newest tokens to give logits for, at least 1.

        Returns:
            Logits (B, keep, V).
        """
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], 1)
        where: dict[str, Any] = {}
        if not bool(self.valid.all()):
            positions = (self.valid.cumsum(1) - 1).clamp(min=0)
            where = {
                "attention_mask": self.valid.long(),
                "position_ids": positions[:, -ids.shape[1] :],
            }
        output = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep,
            **where, **self.options,
        )  # fmt: skip
        seen = self.cache.get_seq_length()
        assert seen == self.valid.shape[1], f"the cache saw {seen} tokens: the model went past it"
        return output.logits

    def feed_all(
        self, texts: Sequence[Sequence[int]], chunk: int, keep: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Feeds whole texts, padded on the left, `chunk` columns at a time.

        Args:
            texts: token ids, each with at least one token.
            chunk: most columns of a forward call.
            keep: newest columns of the whole to give logits for, at least 1.

        Yields:
            The first column of the logits, and logits (B, n, V) of the columns from there on.
        """
        ids, valid = pad_left(texts, self.model.device)
        width = ids.shape[1]
        first = width - keep
        for start in range(0, width, chunk):
            stop = min(start + chunk, width)
            wanted = stop - max(first, start)
            logits = self.feed(ids[:, start:stop], valid[:, start:stop], max(wanted, 1))
            if wanted > 0:
                yield stop - wanted, logits

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with some of the texts."""
        assert self.valid is not None
        indices = torch.tensor(rows, device=self.valid.device)
        self.cache.batch_select_indices(indices)
        self.valid = self.valid[indices]

    def footprint(self) -> Footprint:
        """Of the texts as they are in the cache now."""
        assert self.valid is not None
        return measure(self.cache, self.valid)


def pad_left(
    texts: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Stacks texts that end in the last column.

    Args:
        texts: B lists of ids.
        device: where the answer goes.

    Returns:
        ids (B, T) int64 with 0 at padding, and (B, T) bool, False at padding.

    >>> ids, valid = pad_left([[5, 6, 7], [8]])
    >>> ids.tolist(), valid.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    valid = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        valid[row, width - len(text) :] = True
    return ids.to(device), valid.to(device)
