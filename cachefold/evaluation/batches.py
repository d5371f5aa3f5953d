"""How many texts go through a model at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

_Result = TypeVar("_Result")

# Where `auto` starts: (rows, padded tokens). A CPU gains nothing from more; a GPU that can't hold
# this is found out by trying.
_MOST = {"cpu": (32, 4096)}
_MOST_ELSEWHERE = (256, 65536)
SMALLER_BATCHES = 'batch_size="auto"'
"""The advice for memory that runs out, which a command line words its own way."""


class Batcher:
    """Runs work on texts in batches, the longest first, and smaller ones when memory runs out.

    Args:
        batch_size: texts at once, or `auto`: as many as fit, found by trying.
        device: where the work happens.

    Raises:
        ValueError: a batch size below 1 or another word.

    >>> Batcher(2).run([1, 3, 2], 8, lambda rows: [f"{len(rows)} texts" for _ in rows])
    ['1 texts', '2 texts', '2 texts']
    """

    def __init__(
        self, batch_size: int | Literal["auto"] = "auto", device: torch.device | str = "cpu"
    ) -> None:
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f'batch_size must be >= 1 or "auto", got {batch_size!r}')
        self.auto = batch_size == "auto"
        rows, tokens = _MOST.get(torch.device(device).type, _MOST_ELSEWHERE)
        self.rows: int = rows if isinstance(batch_size, str) else batch_size
        self.tokens: int | None = tokens if self.auto else None
        """Most tokens of a batch, padding included; None = no bound."""

    def run(
        self, lengths: Sequence[int], spread: int, work: Callable[[list[int]], list[_Result]]
    ) -> list[_Result]:
        """Does all the work.

        Args:
            lengths: tokens of each text.
            spread: texts of one batch differ in length by less than this.
            work: gets indices of texts, the longest first, and returns one result for each.

        Returns:
            Results in the order of `lengths`.

        Raises:
            MemoryError, RuntimeError: even one text doesn't fit, or a fixed batch doesn't.
        """
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        results: dict[int, _Result] = {}
        while order:
            batch = self._next(order, lengths, spread)
            try:
                done = work(batch)
            except (MemoryError, RuntimeError) as error:
                self._check_smaller(error, batch, lengths)
                done = None
            if done is None:  # outside the except block, whose traceback keeps tensors alive
                self.tokens = lengths[batch[0]] * len(batch) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            results.update(zip(batch, done, strict=True))
            order = order[len(batch) :]
        return [results[index] for index in range(len(lengths))]

    def _next(self, order: list[int], lengths: Sequence[int], spread: int) -> list[int]:
        longest = lengths[order[0]]
        rows = self.rows
        if self.tokens is not None:
            rows = max(min(rows, self.tokens // max(longest, 1)), 1)
        return [i for i in order[:rows] if longest - lengths[i] < spread]

    def _check_smaller(self, error: Exception, batch: list[int], lengths: Sequence[int]) -> None:
        """Raises the error again where a smaller batch would not help."""
        if not is_memory_error(error):
            raise error
        if self.auto and len(batch) > 1:
            return
        error.add_note(
            f"out of memory with {len(batch)} texts of up to {lengths[batch[0]]} tokens; "
            + (f"{SMALLER_BATCHES} finds what fits" if len(batch) > 1 else "use a shorter text")
        )
        raise error


def is_memory_error(error: Exception) -> bool:
    """Whether memory ran out, on a CPU or a GPU.

    >>> is_memory_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"))
    True
    >>> is_memory_error(RuntimeError("shape mismatch"))
    False
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "allocate memory" in text or "not enough memory" in text or "out of memory" in text
