"""Measures which position of a dial gives which ratio."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.core.accounting import compression_ratio
from cachefold.models.dial import has_dial
from cachefold.models.generation import new_cache
from cachefold.models.run import FoldRun
from cachefold.policies.base import Policy

POSITIONS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
"""Positions at which a calibration measures the ratio first, as far as the dial goes."""
TOKENS_AT_ONCE = 4096
"""Most tokens that go through the model together, unless one text is longer."""
COARSE, ROUNDS = 1.5, 3
"""Ratios further apart than this factor get one between them, so many times."""


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
    at_once = max(TOKENS_AT_ONCE // texts.shape[1], 1)
    for ids in texts.to(model.device).split(at_once):  # type: ignore[no-untyped-call]
        cache = new_cache(model)
        run = FoldRun(position=position)
        model(input_ids=ids, logits_to_keep=1, past_key_values=cache, fold_run=run)
        entries = cache.entries()
        seen += ids.numel() * sum(layer.shape[1] for layer in entries)
        kept += sum(int(layer.sum()) for layer in entries)
    return seen, kept


def check_has_dial(policy: Policy | None) -> None:
    """Refuses the policy of a model that has no dial to calibrate (None: it is not folded).

    Raises:
        ValueError: there is none.
    """
    if policy is None or not has_dial(policy):
        raise ValueError(f"there is no dial to calibrate (policy.max_cr): the policy is {policy}")


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
    check_has_dial(getattr(model, "_cachefold_policy", None))
    return {name: _table(model, name, blocks) for name, blocks in texts.items()}


def _table(model: PreTrainedModel, name: str, texts: Tensor) -> list[tuple[float, float]]:
    policy: Any = model.__dict__["_cachefold_policy"]

    def ratio(position: float) -> float:
        return round(compression_ratio(*reached_counts(model, texts, position)), 4)

    found: dict[float, float] = {}
    for position in POSITIONS:
        found[position] = ratio(position)
        if found[position] > policy.max_cr:
            break
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
