"""What a benchmark run measures; checked before anything slow is imported. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cachefold.core.names import closest

PARTS = ("attention", "generate", "prefill", "llama")
"""In the order they run; `llama` is the outside anchor."""
DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_MODEL = "smollm2-135m"
DELAY = 16
"""Newest tokens that stay exact, as with the policies where nothing else is asked."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which rows a part has: every batch x context x cr, and how often each is timed."""

    batch: tuple[int, ...]
    context: tuple[int, ...]
    cr: tuple[float, ...]
    repeats: int


GRIDS = {
    "attention": Grid((1, 8), (512, 8192), (1.0, 2.0, 4.0, 8.0), 21),
    "generate": Grid((1, 8), (512, 8192), (1.0, 2.0, 4.0, 8.0), 5),
    "prefill": Grid((1,), (2048, 4096, 8192), (4.0,), 3),
    "llama": Grid((1,), (512, 2048, 4096, 8192), (1.0,), 3),
}
"""What a part measures where nothing is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Options of a run.

    >>> BenchConfig(parts=("attention",), cr=(4,)).grid("attention").cr
    (4.0,)
    """

    parts: tuple[str, ...]
    """Of `PARTS`."""
    model: str = DEFAULT_MODEL
    """Zoo name, folder or hub id; `attention` takes only the shapes of its layers."""
    batch: tuple[int, ...] | None = None
    """Requests side by side; None = as `GRIDS` has it, here and below."""
    context: tuple[int, ...] | None = None
    """Tokens in the cache of each request; of a prefill, its length."""
    cr: tuple[float, ...] | None = None
    """Imposed compression ratios, tokens seen / entries kept, ring included."""
    backend: str = "auto"
    """Attention backend."""
    dtype: tuple[str, ...] = ("bfloat16", "float32")
    """Of folded weights and entries, and of the dense model; the better one of each counts.
    `attention` takes the first."""
    repeats: int | None = None
    """Timed rounds after the warm-up."""
    steps: int = 8
    """Tokens that one timed visit of `generate` decodes."""
    threads: int | None = None
    """CPU threads; None = as torch has it."""
    proportional: bool = False
    """Entries are weighed by the tokens they hold, as with `policy.proportional`."""
    seed: int = 0
    """Of entries, decisions and token ids."""

    def __post_init__(self) -> None:
        """Checks values."""
        for name, given, allowed in (("part", self.parts, PARTS), ("--dtype", self.dtype, DTYPES)):
            for value in given:
                if value not in allowed:
                    raise ValueError(
                        f"{name} must be one of {', '.join(allowed)}; got {value!r}."
                        f"{closest(value, allowed)}"
                    )
        if not self.parts or not self.dtype:
            raise ValueError(f"nothing to measure; choose parts of {', '.join(PARTS)} and a dtype")
        for name in ("batch", "context"):
            if any(value < 1 for value in getattr(self, name) or ()):
                raise ValueError(f"--{name} takes whole numbers >= 1; got {getattr(self, name)}")
        if any(not 1 <= value < float("inf") for value in self.cr or ()):
            raise ValueError(f"--cr is tokens seen / entries kept, at least 1; got {self.cr}")
        for name in ("repeats", "steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be >= 1, got {value}")
        for part in self.parts:
            if part != "llama":  # it keeps every token
                check_room(self.grid(part).context, self.grid(part).cr)

    def grid(self, part: str) -> Grid:
        """The rows of a part."""
        asked = {
            name: value
            for name in ("batch", "context", "repeats")
            if (value := getattr(self, name)) is not None
        }
        if self.cr is not None:
            asked["cr"] = tuple(float(value) for value in self.cr)
        return replace(GRIDS[part], **asked)


def numbers(option: str, text: str | None, kind: type[Number]) -> tuple[Number, ...] | None:
    """Reads a list such as `1,8`, with ascending numbers that come once; None stays None.

    Raises:
        ValueError: not such a list.

    >>> numbers("--batch", "8,1,8", int)
    (1, 8)
    """
    if text is None:
        return None
    try:
        return tuple(sorted({kind(item) for item in text.split(",")}))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"{option} takes {what} with commas between, such as 1,8; got {text!r}"
        ) from error


def check_room(context: Sequence[int], cr: Sequence[float]) -> None:
    """Refuses a ratio that a context can't reach: its ring and its open entry are kept whatever.

    Raises:
        ValueError: says which.

    >>> check_room([512], [8.0])
    """
    for tokens in context:
        for ratio in cr:
            if tokens < (DELAY + 2) * ratio:
                raise ValueError(
                    f"cr {ratio:g} leaves {tokens / ratio:.0f} entries of {tokens} tokens, but "
                    f"the newest {DELAY} tokens, an open and a closed entry are kept: choose a "
                    f"context of at least {int((DELAY + 2) * ratio) + 1} or a smaller --cr"
                )
