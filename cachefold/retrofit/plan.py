"""What a retrofit takes, worked out from its recipe and the shape of its base model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cachefold.retrofit.config import RetrofitConfig
from cachefold.retrofit.prepare import fold_for_training, weights_dtype
from cachefold.retrofit.schedule import RetrofitSchedule
from cachefold.zoo import base_config

TOKEN_BYTES = 16
"""Of a token of the training text: all is in memory as int64, twice while sequences are cut."""


@dataclass(frozen=True, slots=True)
class RetrofitPlan:
    """Steps, tokens, parameters and bytes of a retrofit.

    Attributes:
        model: name of the base model.
        steps: optimiser steps of every stage, in order.
        tokens_per_step: tokens of one optimiser step.
        parameters: of the folded model.
        trainable: those that are trained.
        memory: bytes on the device by what holds them; activations come on top.
    """

    model: str
    steps: dict[str, int]
    tokens_per_step: int
    parameters: int
    trainable: int
    memory: dict[str, int]

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return sum(self.steps.values()) * self.tokens_per_step

    def describe(self) -> str:
        """Writes the plan as a few lines."""
        stages = ", ".join(f"{name} {count:,}" for name, count in self.steps.items())
        held = [f"{name} {_readable(count)}" for name, count in self.memory.items() if count]
        total = _readable(sum(self.memory.values()))
        return (
            f"{self.model}: {self.parameters:,} parameters, {self.trainable:,} of them trained\n"
            f"{sum(self.steps.values()):,} steps of {self.tokens_per_step:,} tokens, "
            f"{self.tokens:,} tokens in all: {stages}\n"
            f"memory of the device: {total} ({', '.join(held)}) and activations\n"
            f"memory for the text: {_readable(self.tokens * TOKEN_BYTES)} if none is read twice"
        )


def plan_retrofit(config: RetrofitConfig) -> RetrofitPlan:
    """Folds a model without weights and counts; needs no network for models of `models.shapes`.

    Raises:
        ValueError: no shape to be had, or the policy doesn't fit it.

    >>> plan = plan_retrofit(RetrofitConfig(model="meta-llama/Llama-2-7b-hf", output_dir="out"))
    >>> plan.steps, plan.tokens
    ({'zero_out': 0, 'retrofit': 629, 'solidify': 269}, 459776)
    """
    shape = base_config(config.model)  # not on the meta device: it may have to convert weights
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=weights_dtype(config))
        base_bytes = _bytes(list(model.parameters()))
        fold_for_training(model, config)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    schedule = RetrofitSchedule.of(config)
    stages = [schedule.stage(step) for step in range(config.steps)]
    has_teacher = config.train.kd_weight and not config.train.lora_rank
    return RetrofitPlan(
        model=config.model,
        steps={name: stages.count(name) for name in ("zero_out", "retrofit", "solidify")},
        tokens_per_step=config.tokens_per_step,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trained),
        memory={
            "weights": _bytes(parameters),
            "gradients": _bytes(trained),
            "AdamW": 2 * _bytes(trained),
            "teacher": base_bytes if has_teacher else 0,
        },
    )


def _bytes(parameters: list[Any]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _readable(count: int) -> str:
    """Bytes for a reader.

    >>> _readable(3 * 2**30)
    '3.0 GiB'
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
