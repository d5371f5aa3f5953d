"""What a comparison measures; checked before anything slow is imported. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cachefold.core.names import closest

DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """Options of a comparison; all but `batch_size` change the figures.

    >>> EvalSettings(context=1024).pieces
    6
    """

    model: str = DEFAULT_MODEL
    """Zoo name, folder or hub id of the dense model."""
    dtype: str = "bfloat16"
    """Of weights and entries."""
    pieces: int = 6
    """Most pieces of each held-out file."""
    tokens: int = 1024
    """Tokens of a piece."""
    context: int = 2048
    """Tokens in the cache where bytes and speed are measured."""
    limit: int | None = None
    """Most rows of a task, or prompts to make; None = all, or as many as is usual."""
    batch_size: int | Literal["auto"] = "auto"
    """Requests side by side in tasks."""
    seed: int = 0
    """Of policies that draw."""

    def __post_init__(self) -> None:
        """Checks values."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}."
                f"{closest(self.dtype, DTYPES)}"
            )
        least = {"pieces": 1, "tokens": 2, "context": 2, "limit": 1, "batch_size": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < smallest:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be >= {smallest}, got {value}")
