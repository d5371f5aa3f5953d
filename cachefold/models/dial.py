"""The dial of a folded model: set and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from cachefold.cache import FoldedCache
from cachefold.core.dial import DEFAULT_PRESET, Dial
from cachefold.models.run import FoldRun
from cachefold.policies.base import Policy
from cachefold.policies.budget import BudgetPolicy


def has_dial(policy: Policy) -> bool:
    """Whether models of a policy serve a range of ratios.

    >>> from cachefold import DMC
    >>> has_dial(DMC(cr=2)), has_dial(DMC(cr=2, max_cr=8))
    (False, True)
    """
    return not isinstance(policy, BudgetPolicy) and policy.max_cr is not None


def check_dial(policy: Any, dial: Dial, cr: float | None, preset: str | None) -> None:
    """Refuses a ratio or preset that models of a policy don't serve; takes no model.

    Args:
        policy: of the model, a `Policy`.
        dial: calibration that has to know the preset.
        cr: ratio asked for; None = none.
        preset: kind of text asked for; None = none.

    Raises:
        ValueError: there is no dial, the ratio is out of its range, or an unknown preset.
    """
    if cr is None and preset is None:
        return
    if not has_dial(policy):
        asked = " and ".join(
            f"{name}={value}"
            for name, value in (("cr", cr), ("preset", preset))
            if value is not None
        )
        alone = "" if policy.cr is None else f"; it serves cr={policy.cr:g} alone"
        raise ValueError(
            f"{asked}: only a dial takes that, and this model has none{alone}. Leave it out, or "
            "load an artefact with a dial (policy.max_cr)"
        )
    # A word, as a command line may bring it, can't be compared.
    if cr is not None and (isinstance(cr, str) or not 1 <= cr <= policy.max_cr):
        raise ValueError(
            f"this dial serves cr from 1 to {policy.max_cr:g}, tokens seen / entries kept; got "
            f"{cr!r}"
        )
    if preset is not None:
        dial.table(preset)


def with_position(model: Any, run: FoldRun, cache: FoldedCache | None) -> FoldRun:
    """The run at the position of the dial that the cache asks for, else the policy.

    Args:
        model: folded, with a dial.
        run: without a position.
        cache: of this forward pass, if there is one.
    """
    cr, preset = (None, None) if cache is None else (cache.cr, cache.preset)
    return replace(run, position=dial_position(model, cr, preset))


def dial_position(model: Any, cr: float | None = None, preset: str | None = None) -> float:
    """What is added to the decisions of a folded model with a dial.

    Args:
        model: folded, with a dial.
        cr: ratio; None = its own.
        preset: kind of text; None = its own.
    """
    position: float = model._cachefold_dial.position(
        model._cachefold_policy.cr if cr is None else cr, preset
    )
    return position


def turn_dial(
    model: PreTrainedModel,
    tables: Mapping[str, Sequence[tuple[float, float]]],
    cr: float | None = None,
    preset: str | None = None,
) -> None:
    """Calibrates the dial of a folded model, and sets its ratio and preset.

    Args:
        model: folded.
        tables: of `core.dial.Dial`; none for a model without a dial.
        cr: ratio wherever a cache asks for none; None = as it is.
        preset: kind of text wherever a cache names none; None = `bulk`.

    Raises:
        ValueError: a ratio or preset that the model does not serve; nothing was changed.
    """
    dial = Dial(tables, preset or DEFAULT_PRESET)
    state: Any = model
    check_dial(state._cachefold_policy, dial, cr, preset)
    state._cachefold_dial = dial
    if cr is not None:
        policy = state._cachefold_policy = replace(state._cachefold_policy, cr=cr)
        model.config.cachefold = policy.to_dict()
