"""Values of a recipe that their types alone do not check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachefold.core.decisions import RELAXATIONS
from cachefold.core.names import closest

if TYPE_CHECKING:
    from cachefold.retrofit.config import DataConfig, RetrofitConfig, TrainConfig

DTYPES = ("bfloat16", "float32")


def check_data(data: DataConfig) -> None:
    """Checks the group `data`.

    Raises:
        ValueError: a value out of its range.
    """
    if data.seq_len < 2:
        raise ValueError(f"data.seq_len must be at least 2 tokens, got {data.seq_len}")
    if data.held_out < 1:
        raise ValueError(f"data.held_out must be at least 1 sequence, got {data.held_out}")
    if not 0 <= data.recall < 1:
        raise ValueError(f"data.recall is a share of the text, 0 to below 1, got {data.recall}")
    if data.files and data.dataset:
        raise ValueError("give data.files or data.dataset, not both")


def check_train(train: TrainConfig) -> None:
    """Checks the group `train`.

    Raises:
        ValueError: a value out of its range.
    """
    for name in ("tokens", "batch_size", "accumulation", "save_every", "log_every"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
    for name in ("learning_rate", "decision_learning_rate", "temperature", "max_grad_norm"):
        if not getattr(train, name) > 0:
            raise ValueError(f"train.{name} must be > 0, got {getattr(train, name)}")
    for name in (
        "lora_rank", "weight_decay", "kd_weight", "ce_weight", "hidden_weight",
        "compression_weight", "zero_out_steps",
    ):  # fmt: skip
        if not getattr(train, name) >= 0:
            raise ValueError(f"train.{name} must be >= 0, got {getattr(train, name)}")
    for name in ("ramp_fraction", "solidify_fraction"):
        if not 0 <= getattr(train, name) <= 1:
            raise ValueError(f"train.{name} must be between 0 and 1, got {getattr(train, name)}")
    for name, allowed in (("dtype", DTYPES), ("relaxation", RELAXATIONS)):
        value = getattr(train, name)
        if value not in allowed:
            hint = closest(value, list(allowed))
            raise ValueError(
                f"train.{name} must be one of {', '.join(allowed)}; got {value!r}.{hint}"
            )
    for pair in train.spare:
        if len(pair) != 2 or min(pair) < 0:
            raise ValueError(f"train.spare lists [layer, kv head] pairs, both from 0; got {pair}")
        if train.spare.count(pair) > 1:
            raise ValueError(f"train.spare names {pair} twice; a head is spared once")
    if train.kd_weight == train.ce_weight == 0:
        raise ValueError("train.kd_weight and train.ce_weight are both 0: nothing keeps quality")
    if train.hidden_weight and not train.kd_weight:
        raise ValueError(
            "train.hidden_weight matches the original model, which is not run with "
            "train.kd_weight=0; set that above 0, or train.hidden_weight to 0"
        )


def check_schedule(config: RetrofitConfig, policy: Any) -> None:
    """Checks what takes several fields together.

    Raises:
        ValueError: they contradict each other.
    """
    train, neuron = config.train, policy.decision == "neuron"
    if train.spare and (policy.decision != "linear" or policy.per != "head"):
        raise ValueError(
            "train.spare is for heads that decide alone, by a projection; set policy.decision: "
            f"linear and policy.per: head, got {policy.decision} and {policy.per}"
        )
    if config.data.seq_len <= policy.delay:
        raise ValueError(
            f"data.seq_len must be more than policy.delay, or no token is ever merged; got "
            f"{config.data.seq_len} and {policy.delay}"
        )
    if train.ramp_fraction + train.solidify_fraction > 1 + 1e-9:
        raise ValueError(
            "train.ramp_fraction + train.solidify_fraction must be <= 1: the target is to be "
            f"reached before the learning rate falls; got {train.ramp_fraction} + "
            f"{train.solidify_fraction}"
        )
    if train.zero_out_steps and not neuron:
        raise ValueError("train.zero_out_steps is only for policy.decision: neuron; set it to 0")
    if train.zero_out_steps >= config.steps:
        raise ValueError(
            f"train.zero_out_steps must be less than the {config.steps} steps that train.tokens "
            f"allows, got {train.zero_out_steps}"
        )
    if neuron and train.lora_rank:
        raise ValueError(
            "policy.decision: neuron changes the projections themselves, so the frozen original "
            f"has to be the teacher; set train.lora_rank: 0, got {train.lora_rank}"
        )
