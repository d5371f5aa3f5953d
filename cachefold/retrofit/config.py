"""The recipe of a retrofit: typed, read from YAML, every field documented where it is declared."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cachefold.core.names import closest
from cachefold.policies import get_policy
from cachefold.policies.budget import BudgetPolicy
from cachefold.retrofit.checks import check_data, check_schedule, check_train

_Config = TypeVar("_Config")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the training text comes from."""

    files: list[str] = field(default_factory=list)
    """Local `.jsonl` or `.txt` files, each also as `.gz`; relative to the working folder."""
    dataset: str | None = None
    """Name of a dataset for the `datasets` library, used instead of `files`."""
    split: str = "train"
    """Split of `dataset`."""
    text_field: str = "text"
    """Field of a row that holds the text; rows with `messages` go through the chat template."""
    seq_len: int = 512
    """Tokens per training sequence; also the length at which the target ratio is meant."""
    recall: float = 0.0
    """Share of the training text that is made to say things again (`retrofit.recall`), in
    [0, 1): what a folded cache must keep to find something later. Made of the same text."""
    held_out: int = 8
    """Sequences kept out of training and used for the final measurement of the ratio."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained."""

    tokens: int = 460_000
    """Training tokens in all; steps = tokens / (seq_len * batch_size * accumulation)."""
    batch_size: int = 1
    """Sequences per forward pass."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float = 1e-3
    """Of the LoRA weights, or of all weights with `lora_rank: 0`."""
    decision_learning_rate: float = 3e-3
    """Of the decision modules."""
    weight_decay: float = 0.0
    """AdamW's, of the LoRA weights, or of all matrices with `lora_rank: 0`."""
    lora_rank: int = 8
    """Rank of the LoRA on the attention projections; 0 trains all weights instead."""
    temperature: float = 0.3
    """Of the relaxed decisions."""
    relaxation: str = "gumbel"
    """`gumbel`, `straight-through` or `sigmoid`."""
    kd_weight: float = 1.0
    """Weight of KL(original || folded) on the logits; with 0 there is no teacher."""
    ce_weight: float = 0.0
    """Weight of the cross entropy with the text."""
    hidden_weight: float = 0.0
    """Weight of the mean squared distance of the last hidden states to those of the original, over
    the mean square of the original's; needs `kd_weight` above 0."""
    compression_weight: float = 5.0
    """Weight of the compression loss: one-sided, of a dial two-sided."""
    ramp_from: float = 1.0
    """Ratio at which the ramp starts; that of `init` where there is one."""
    ramp_fraction: float = 0.6
    """Part of the steps after the zero-out over which the target rises from `ramp_from` to
    `policy.cr`, or the range of a dial to `policy.max_cr`."""
    solidify_fraction: float = 0.3
    """Last part of these steps, in which the learning rate falls to a tenth along a cosine."""
    zero_out_steps: int = 0
    """First steps, which fade the decision neuron out of attention while nothing merges; only for
    decision `neuron`. 0 = the model has been through this already."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    save_every: int = 50
    """Steps between checkpoints."""
    log_every: int = 1
    """Steps between log lines."""
    seed: int = 0
    """Of the data order, the LoRA weights and the noise on the decisions."""
    dtype: str = "bfloat16"
    """`bfloat16` or `float32`; of the base weights and the matrix products."""
    spare: list[list[int]] = field(default_factory=list)
    """Heads that merge later than others, [layer, kv head] each: those that look words up far back
    (retrieval heads). Their decisions stay as they start, and the others compress the more. With a
    dial they catch up towards the largest ratio."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the backward pass."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""


@dataclass(frozen=True, kw_only=True)
class RetrofitConfig:
    """All a retrofit needs; one YAML file.

    >>> config = RetrofitConfig(
    ...     model="smollm2-135m",
    ...     output_dir="runs/first",
    ...     policy={"name": "dmc", "cr": 4},
    ...     data=DataConfig(files=["text.jsonl"], seq_len=512),
    ...     train=TrainConfig(tokens=10_240, batch_size=2),
    ... )
    >>> config.steps, config.build_policy().cr
    (10, 4)
    """

    model: str
    """Zoo name, hub id or folder of the model to fold."""
    output_dir: str
    """Folder for checkpoints, log and result."""
    init: str | None = None
    """Folder of an artefact to start from, of the same base, kind of policy (or `gqa` with the same
    `kv_heads`) and LoRA rank; a dial also for a single ratio."""
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "dmc"})
    """Policy name and its options, such as `{name: dmc, cr: 2, delay: 16}`."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""

    def __post_init__(self) -> None:
        """Checks values that types alone do not."""
        policy = self.build_policy()
        check_data(self.data)
        check_train(self.train)
        check_schedule(self, policy)

    def build_policy(self) -> Any:
        """Makes the policy.

        Raises:
            ValueError: unknown policy or option, or a value it refuses.
        """
        options = dict(self.policy)
        name = options.pop("name", "dmc")
        try:
            policy = get_policy(name, **options)
        except TypeError as error:
            raise ValueError(f"policy: a value has the wrong type ({error})") from error
        if isinstance(policy, BudgetPolicy):
            raise ValueError(f"policy {name!r} learns nothing: cachefold.folded(model, policy)")
        return policy

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimiser step sees."""
        return self.data.seq_len * self.train.batch_size * self.train.accumulation

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.train.tokens // self.tokens_per_step)

    def to_yaml(self) -> str:
        """The whole recipe with every default written out; `load_recipe` reads it back."""
        return str(yaml.safe_dump(asdict(self), sort_keys=False))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RetrofitConfig:
    """Reads a YAML recipe; defaults < recipe < overrides.

    Args:
        path: the YAML file.
        overrides: items such as `train.tokens=1000` or `policy.cr=4`; values are read as YAML.

    Raises:
        ValueError: no such file, bad YAML, unknown key (with the closest match) or wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}; the ones shipped with cachefold are in recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold key: value pairs, got a {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> RetrofitConfig:
    """Builds a recipe from nested dictionaries, checking keys and types."""
    return _build(RetrofitConfig, values, "")


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"an override looks like train.tokens=1000, got {override!r}")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{override!r}: {parent!r} holds one value, not a group of keys")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from error


def _build(cls: type[_Config], values: Any, prefix: str) -> _Config:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')}: must be a group of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(
                f"unknown key {prefix}{key}.{closest(str(key), list(hints))} "
                f"Keys here: {', '.join(hints)}."
            )
    for entry in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = entry.default is entry.default_factory is dataclasses.MISSING
        if required and entry.name not in values:
            raise ValueError(f"the recipe has no {prefix}{entry.name}; add it, or override it")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, name + ".")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(args[0], value, name)
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    is_flag = isinstance(value, bool)  # a bool is an int to Python, not to us
    if origin is None and isinstance(value, hint) and is_flag == (hint is bool):
        return value
    wanted = getattr(origin or hint, "__name__", str(hint))
    raise ValueError(f"{name} must be a {wanted}, got {value!r} ({type(value).__name__})")
