"""Interleaved timing: every variant once per round, so that a busy moment hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Repeated times of one variant, ms each.

    >>> times = Times([3.0, 1.0, 2.0]).per(2)
    >>> times.median, times.low, times.high
    (1.0, 0.75, 1.25)
    """

    ms: list[float]

    @property
    def median(self) -> float:
        """Median, ms."""
        return statistics.median(self.ms)

    @property
    def low(self) -> float:
        """First quartile, ms."""
        return self._quartiles()[0]

    @property
    def high(self) -> float:
        """Third quartile, ms."""
        return self._quartiles()[2]

    def _quartiles(self) -> list[float]:
        if len(self.ms) == 1:
            return self.ms * 3
        return statistics.quantiles(self.ms, n=4, method="inclusive")

    def per(self, count: int) -> Times:
        """Divides every time by the number of calls it holds."""
        return Times([ms / count for ms in self.ms])


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    before: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Times variants side by side; each round starts with another one.

    Args:
        variants: what to call, by name; warmed up by the caller.
        repeats: rounds.
        before: called before each of them, outside the measured time.

    Returns:
        Times by name.

    >>> sorted(interleave({"a": int, "b": list}, repeats=3)["a"].ms)[0] >= 0
    True
    """
    names = list(variants)
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(repeats):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                if before is not None:
                    before()
                found[name].append(elapsed_ms(variants[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Times(ms) for name, ms in found.items()}


def elapsed_ms(function: Callable[[], object]) -> float:
    """Time of one call, ms; a GPU is waited for before and after.

    >>> elapsed_ms(int) >= 0
    True
    """
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contenders(warm: Mapping[str, float], group: str, slower: float = 2.0) -> set[str]:
    """Which variants of a group are worth more rounds: only its fastest counts in the end.

    Args:
        warm: ms of a first call, by name.
        group: start of the names.
        slower: a variant that takes so many times as long as the fastest drops out.

    >>> sorted(contenders({"dense_a": 1.0, "dense_b": 1.5, "dense_c": 9.0, "x": 5.0}, "dense"))
    ['dense_a', 'dense_b']
    """
    members = {name: ms for name, ms in warm.items() if name.startswith(group)}
    fastest = min(members.values(), default=0.0)
    return {name for name, ms in members.items() if ms <= slower * fastest}
