"""Artefacts: adapters and decision weights in one safetensors file beside a JSON config.

The base model is named, never copied. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.models.fold import fold, is_folded
from cachefold.models.lora import add_lora, lora_rank
from cachefold.models.lora import adapters_disabled as adapters_disabled  # TEMP
from cachefold.policies import get_policy

WEIGHTS = "cachefold.safetensors"
CONFIG = "cachefold.json"
FORMAT = 1


def trainable_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Adapters, decision weights and whatever else is trained, by parameter name, on CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or "lora_" in name or ".decision." in name
    }


def load_trainable_state(model: PreTrainedModel, path: Path) -> None:
    """Copies a saved state into a model of the same shape, in place.

    Raises:
        ValueError: unreadable file, missing or surplus names, other shapes; nothing is copied.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    parameters = dict(model.named_parameters())
    expected = set(trainable_state(model))
    if expected - set(state) or set(state) - set(parameters):
        odd = sorted((expected - set(state)) | (set(state) - set(parameters)))
        raise ValueError(f"{path} does not fit the model; first name that differs: {odd[0]}")
    for name, tensor in state.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model has "
                f"{tuple(parameters[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def save_folded(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    base: dict[str, str],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes an artefact; each file is complete or absent.

    Args:
        model: a folded model.
        folder: where to; made if missing.
        base: `id` (zoo name, hub id or folder) and `revision` of the base model.
        extra: facts to keep beside it, such as tokens trained.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not folded.
    """
    if not is_folded(model):
        raise ValueError("only a folded model can be saved; call fold(model, policy) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "base": base,
        "policy": model.config.cachefold,
        "lora_rank": lora_rank(model),
        **(extra or {}),
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file(trainable_state(model), Path(scratch) / WEIGHTS, metadata={"format": "pt"})
        (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(scratch) / name, folder / name)
    return folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads the JSON config of an artefact.

    Raises:
        ValueError: no artefact there, or a format this version does not know.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no cachefold artefact: {CONFIG} is missing")
    config = json.loads(path.read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: format {config.get('format')!r}; this version reads {FORMAT}")
    return config


def load_folded(folder: str | Path, base_model: PreTrainedModel) -> PreTrainedModel:
    """Folds `base_model` in place with an artefact's policy and weights.

    Args:
        folder: an artefact written by `save_folded`.
        base_model: the dense base model, freshly loaded.

    Returns:
        The same model, folded, in eval mode.

    Raises:
        ValueError: no artefact, or it does not fit the model.
    """
    config = read_config(folder)
    fold(base_model, get_policy(**config["policy"]))
    if config["lora_rank"]:
        add_lora(base_model, config["lora_rank"])
    load_trainable_state(base_model, Path(folder) / WEIGHTS)
    return base_model.eval().requires_grad_(False)
