"""The dial of a folded model: set, checked, measured and calibrated."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.cache import FoldedCache
from cachefold.core.accounting import compression_ratio, count_entries
from cachefold.core.decisions import Decisions
from cachefold.core.dial import DEFAULT_PRESET, Dial
from cachefold.models.run import FoldRun
from cachefold.policies.base import Policy
from cachefold.policies.budget import BudgetPolicy

POSITIONS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
"""Positions at which a calibration measures the ratio first."""
COARSE, ROUNDS = 1.3, 3
"""Ratios further apart than this factor get one between them, so many times."""


def has_dial(policy: Policy) -> bool:
    """Whether models of a policy serve a range of ratios.

    >>> from cachefold import DMC
    >>> has_dial(DMC(cr=2)), has_dial(DMC(cr=2, max_cr=8))
    (False, True)
    """
    return not isinstance(policy, BudgetPolicy) and policy.max_cr is not None


def check_dial(model: Any, cr: float | None, preset: str | None) -> None:
    """Refuses a ratio or preset that a model doesn't serve.

    Raises:
        ValueError: the model has no dial, the ratio is out of its range, or an unknown preset.
    """
    if cr is None and preset is None:
        return
    policy: Any = model._cachefold_policy
    if not has_dial(policy):
        raise ValueError(
            f"cr={cr} and preset={preset!r} turn a dial, and this model has none: its policy is "
            f"{policy}. Leave them out, or load an artefact with a dial (policy.max_cr)"
        )
    if cr is not None and not 1 <= cr <= policy.max_cr:
        raise ValueError(
            f"this dial serves cr from 1 to {policy.max_cr:g}, tokens seen / entries kept; got {cr}"
        )
    if preset is not None:
        model._cachefold_dial.table(preset)


def with_position(model: Any, run: FoldRun, cache: FoldedCache | None) -> FoldRun:
    """The run at the position of the dial that the cache asks for, else the policy.

    Args:
        model: folded, with a dial.
        run: without a position.
        cache: of this forward pass, if there is one.
    """
    cr = model._cachefold_policy.cr if cache is None or cache.cr is None else cache.cr
    preset = None if cache is None else cache.preset
    return replace(run, position=model._cachefold_dial.position(cr, preset))


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
    check_dial(model, cr, None)
    if preset is not None:
        dial.table(preset)
    state: Any = model
    state._cachefold_dial = dial
    if cr is not None:
        policy = state._cachefold_policy = replace(state._cachefold_policy, cr=cr)
        model.config.cachefold = policy.to_dict()


@torch.no_grad()
def reached_counts(model: Any, texts: Tensor, position: float | None = None) -> tuple[int, int]:
    """Tokens seen and entries kept on texts, with the hard decisions of inference.

    Args:
        model: folded by a policy that learns.
        texts: (M, T) token ids.
        position: of the dial; None = as the model is set.

    Returns:
        Totals over texts, layers and heads.
    """
    seen = kept = 0
    for ids in texts.to(model.device).split(1):  # type: ignore[no-untyped-call]
        decisions: dict[int, Decisions] = {}
        run = FoldRun(position=position, recorder=decisions)
        model(input_ids=ids, logits_to_keep=1, use_cache=False, fold_run=run)
        valid = torch.ones_like(ids, dtype=torch.bool)
        alphas = (decision.alpha for decision in decisions.values())
        counts = count_entries(alphas, valid, model._cachefold_policy.delay)
        seen, kept = seen + counts[0], kept + counts[1]
    return seen, kept


def calibrate(
    model: PreTrainedModel, texts: Mapping[str, Tensor]
) -> dict[str, list[tuple[float, float]]]:
    """Measures which position of the dial gives which ratio.

    Args:
        model: folded, with a dial.
        texts: for each preset (M, T) token ids; the ratio is meant at this length T.

    Returns:
        Tables for `turn_dial`. A position that doesn't raise the ratio is left out.

    Raises:
        ValueError: the model has no dial, or its ratio hardly moves with it.
    """
    policy: Any = getattr(model, "_cachefold_policy", None)
    if policy is None or not has_dial(policy):
        raise ValueError(f"there is no dial to calibrate (policy.max_cr): the policy is {policy}")
    return {name: _table(model, name, blocks) for name, blocks in texts.items()}


def _table(model: PreTrainedModel, name: str, texts: Tensor) -> list[tuple[float, float]]:
    policy: Any = model.__dict__["_cachefold_policy"]

    def ratio(position: float) -> float:
        return round(compression_ratio(*reached_counts(model, texts, position)), 4)

    found = {position: ratio(position) for position in POSITIONS}
    for _ in range(ROUNDS):
        marks = sorted(found)
        for low, high in itertools.pairwise(marks):
            if found[low] < policy.max_cr and found[high] > found[low] * COARSE:
                found[(low + high) / 2] = ratio((low + high) / 2)
    table: list[tuple[float, float]] = []
    for position in sorted(found):
        if found[position] > (table[-1][0] if table else 1.0) * 1.001:
            table.append((found[position], position))
    if len(table) < 2:
        raise ValueError(
            f"preset {name!r}: the ratio doesn't rise with the dial (measured {table}); the model "
            "is not trained, or its dial is not"
        )
    return table
