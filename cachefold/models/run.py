"""How one forward pass of a folded model decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    the zero-out stage of decision `neuron`) or `dense` (attention unfolded, weights and adapters
    as they are: the original model only where nothing but adapters was trained, and within
    `models.lora.adapters_disabled`)."""
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


def check_evicting_run(name: str, run: FoldRun) -> None:
    """Refuses what a policy that learns nothing can't do.

    Args:
        name: of the policy.
        run: asked for.

    Raises:
        ValueError: a recorder, or a mode of training.
    """
    if run.mode in ("hard", "dense") and run.recorder is None:
        return
    asked = "a recorder" if run.recorder is not None else f"mode {run.mode!r}"
    raise ValueError(
        f"fold_run asks for {asked}, but {name} learns nothing and takes no decisions of that "
        'kind; use mode "hard" (which evicts) or "dense", and read what was kept from the cache'
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of transformers that a folded layer would not heed.

    Args:
        options: of a forward pass, by name.

    Raises:
        ValueError: texts packed in one row, or attention weights asked for.

    >>> check_options({"cu_seq_lens_q": None})
    """
    if options.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "cu_seq_lens_q packs several texts in one row, which a folded layer can't keep apart; "
            "leave it out and give every text a row of its own, with padding"
        )
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: a folded layer gives no attention weights, as what it attends "
            "to are not the tokens. Leave it out (model.config.output_attentions = False if it "
            "comes from there); FoldRun(recorder={}) records the decisions of a learned policy, "
            'and FoldRun(mode="dense") gives the weights without folding'
        )
