"""Loads the base model of a retrofit, folds it and decides what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cachefold.core.dial import Dial, nominal_position
from cachefold.models.families import attention_layers
from cachefold.models.fold import fold, folded_layers
from cachefold.models.hub import WEIGHTS, read_config
from cachefold.models.lora import add_lora
from cachefold.models.weights import load_artefact_state
from cachefold.policies.decisions import LinearDecision
from cachefold.policies.gqa import GQA
from cachefold.retrofit.config import RetrofitConfig
from cachefold.zoo import load_base


def fold_for_training(model: PreTrainedModel, config: RetrofitConfig) -> PreTrainedModel:
    """Folds a model in place, with the LoRA of the recipe.

    Raises:
        ValueError: the policy doesn't fit the model.
    """
    fold(model, config.build_policy())
    if config.train.lora_rank:
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            add_lora(model, config.train.lora_rank)
    return model


def weights_dtype(config: RetrofitConfig) -> torch.dtype:
    """Of the base weights: float32 where they are trained, else that of the matrix products."""
    return getattr(torch, config.train.dtype) if config.train.lora_rank else torch.float32


def load_model(config: RetrofitConfig) -> tuple[PreTrainedModel, Any]:
    """Loads the base model and its tokenizer."""
    return load_base(config.model, dtype=weights_dtype(config))


def prepare(model: PreTrainedModel, config: RetrofitConfig) -> PreTrainedModel | None:
    """Folds a model in place and decides what is trained.

    Returns:
        The teacher, when one is needed and the model can't be its own because all weights are
        trained.
    """
    teacher = None
    if config.train.kd_weight and config.train.lora_rank == 0:
        teacher, _ = load_model(config)
        fold(teacher, config.build_policy())  # to know `fold_run`; runs dense
    fold_for_training(model, config)
    if config.init is not None:
        start_from(model, config)
    spare_heads(model, config.train.spare, config.build_policy().max_cr)
    return teacher


def spare_heads(
    model: PreTrainedModel, heads: Sequence[Sequence[int]], max_cr: float | None
) -> None:
    """Makes heads of a prepared model merge later than the others, whatever it learns.

    Args:
        model: folded, with decisions that are projections.
        heads: (layer, kv head) each.
        max_cr: largest ratio of the dial, at which they merge like the others; None = no dial.

    Raises:
        ValueError: the model has no such head, or its layer does not fold.
    """
    layers = attention_layers(model)
    folds = folded_layers(model)
    end = None if max_cr is None else nominal_position(max_cr)
    for layer, head in heads:
        if layer not in folds:
            raise ValueError(
                f"train.spare: layer {layer} does not fold; those that do: {min(folds)} to "
                f"{max(folds)}"
            )
        decision: Any = layers[layer].decision
        count = decision.num_kv_heads
        if head >= count:
            raise ValueError(
                f"train.spare: layer {layer} has kv heads 0 to {count - 1}, got {head}"
            )
        decision.spare(head, end)


def check_init(config: RetrofitConfig) -> dict[str, Any]:
    """Refuses an artefact `config.init` that the recipe can't start from, by its config alone.

    Returns:
        The config of the artefact.

    Raises:
        ValueError: no artefact there, one of another base, policy or LoRA rank, or a dial that ends
            below the ratio.
    """
    assert config.init is not None
    try:
        artefact = read_config(config.init)
    except ValueError as error:
        raise ValueError(f"init: {error}; `cachefold ls artefacts` shows what is there") from error
    policy = config.build_policy()
    before = artefact["policy"]
    pooled = before["name"] == GQA.name and before["kv_heads"] == policy.kv_heads
    name = policy.name if pooled else before["name"]
    found = (artefact["base"].get("id"), name, before.get("kv_heads"), artefact["lora_rank"])
    wanted = (config.model, policy.name, policy.kv_heads, config.train.lora_rank)
    if found != wanted:
        raise ValueError(
            f"init {config.init} has {_kind(*found)}; the recipe asks for {_kind(*wanted)}"
        )
    if before.get("proportional") and not getattr(policy, "proportional", False):
        raise ValueError(
            f"init {config.init} was trained with policy.proportional=true; set it in the recipe"
        )
    most = before.get("max_cr")
    if most is not None and policy.max_cr is None and policy.cr > most:
        raise ValueError(
            f"init {config.init} is a dial for ratios up to {most:g}; the recipe asks for "
            f"{policy.cr:g} (policy.cr)"
        )
    return artefact


def start_from(model: PreTrainedModel, config: RetrofitConfig) -> None:
    """Copies the weights of the artefact `config.init` into a prepared model.

    A dial and proportional attention may be new, and all that decides where only heads were pooled
    before (`gqa`): what they learn then starts at its default. A dial that goes on as a single
    ratio starts as it was at that ratio.

    Raises:
        ValueError: as `check_init`, or the weights don't fit.
    """
    assert config.init is not None
    artefact = check_init(config)
    fresh = [name for name, _ in model.named_parameters() if _is_new(name, artefact["policy"])]
    with _dial_settled(model, artefact, config.build_policy()):
        load_artefact_state(model, Path(config.init) / WEIGHTS, artefact, fresh=tuple(fresh))


@contextlib.contextmanager
def _dial_settled(model: PreTrainedModel, artefact: dict[str, Any], policy: Any) -> Iterator[None]:
    """Lets a model without a dial take the state of one, and then stay at its own ratio."""
    if artefact["policy"].get("max_cr") is None or policy.max_cr is not None:
        yield
        return
    layers = attention_layers(model)
    decisions = [layers[layer].decision for layer in folded_layers(model)]
    projections = [one for one in decisions if isinstance(one, LinearDecision)]
    for one in projections:
        one.slope = nn.Parameter(torch.zeros(one.num_kv_heads))
    yield
    for one in projections:
        one.settle(Dial(artefact.get("dial", {})).position(policy.cr))


def _kind(base: str | None, policy: str, kv_heads: int | None, lora_rank: int) -> str:
    return f"base {base}, policy {policy} with kv_heads {kv_heads} and LoRA rank {lora_rank}"


def _is_new(name: str, before: dict[str, Any]) -> bool:
    """Whether a retrofit with that policy had no such parameter."""
    if before["name"] == GQA.name:
        return ".decision." in name
    had_dial, had_sizes = before.get("max_cr") is not None, bool(before.get("proportional"))
    return (name.endswith(".decision.slope") and not had_dial) or (
        name.endswith(".decision.growth") and not had_sizes
    )
