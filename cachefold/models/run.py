"""How one forward pass of a folded model decides."""

from __future__ import annotations

from dataclasses import dataclass

from cachefold.core.decisions import RELAXATIONS, Decisions
from cachefold.core.names import closest

MODES = ("hard", "relaxed", "append", "dense")


@dataclass(frozen=True, kw_only=True)
class FoldRun:
    """How one forward pass of a folded model decides; passed as `model(..., fold_run=...)`.

    >>> FoldRun(mode="relaxed").temperature
    0.3
    """

    mode: str = "hard"
    """`hard` (inference), `relaxed` (training), `append` (nothing merges and every token stays:
    the zero-out stage of decision `neuron`) or `dense` (the original model)."""
    temperature: float = 0.3
    """Of the relaxation."""
    relaxation: str = "gumbel"
    """`gumbel`, `straight-through` or `sigmoid`."""
    zero_out: float = 0.0
    """Factor left on the decision neuron before and after RoPE; only for decision `neuron`."""
    position: float | None = None
    """Of the dial (`core.dial`); None = that of the cache, else of the policy."""
    recorder: dict[int, Decisions] | None = None
    """Filled with the decisions used, by layer index."""

    def __post_init__(self) -> None:
        """Checks values."""
        for name, allowed in (("mode", MODES), ("relaxation", RELAXATIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {value!r}."
                    f"{closest(value, allowed)}"
                )
