"""Loads the base model of a retrofit, folds it and decides what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cachefold.models.fold import fold
from cachefold.models.hub import WEIGHTS, load_trainable_state, read_config
from cachefold.models.lora import add_lora
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
    return teacher


def start_from(model: PreTrainedModel, config: RetrofitConfig) -> None:
    """Copies the weights of the artefact `config.init` into a prepared model.

    A dial and proportional attention may be new: what they learn then starts at its default.

    Raises:
        ValueError: no artefact there, or one of another base, policy or LoRA rank.
    """
    assert config.init is not None
    artefact = read_config(config.init)
    policy = config.build_policy()
    found = (artefact["base"].get("id"), artefact["policy"]["name"], artefact["lora_rank"])
    wanted = (config.model, policy.name, config.train.lora_rank)
    if found != wanted:
        raise ValueError(
            f"init {config.init} has base {found[0]}, policy {found[1]} and LoRA rank {found[2]}; "
            f"the recipe asks for {wanted[0]}, {wanted[1]} and {wanted[2]}"
        )
    if artefact["policy"].get("proportional") and not getattr(policy, "proportional", False):
        raise ValueError(
            f"init {config.init} was trained with policy.proportional=true; set it in the recipe"
        )
    had_dial = artefact["policy"].get("max_cr") is not None
    fresh = [] if had_dial or policy.max_cr is None else [".decision.slope"]
    if getattr(policy, "proportional", False) and not artefact["policy"].get("proportional"):
        fresh.append(".decision.growth")
    load_trainable_state(model, Path(config.init) / WEIGHTS, fresh=tuple(fresh))
