"""The weights that an artefact or a checkpoint holds, by parameter name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

ALL_WEIGHTS = "all_weights"
"""Key of the config of an artefact: whether its file has every weight of the model."""


def trainable_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Adapters, decision weights and whatever else is or was trained, by parameter name, on CPU.

    Weights that came out of an artefact count: they are frozen now, and not those of the base.
    """
    state: Any = model
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or _is_added(name) or name in state._cachefold_loaded
    }


def load_trainable_state(model: PreTrainedModel, path: Path) -> None:
    """Copies a saved state into the model that wrote it, or one that trains the same, in place.

    Args:
        model: folded, with LoRA if the state has it.
        path: the safetensors file.

    Raises:
        ValueError: unreadable file, missing or surplus names, other shapes; nothing is copied.
    """
    _copy_state(model, path, _read_state(path), set(trainable_state(model)))


def load_artefact_state(
    model: PreTrainedModel, path: Path, config: dict[str, Any], *, fresh: Sequence[str] = ()
) -> None:
    """Copies the weights of an artefact into a model of the same shape, in place.

    Which weights of the model are trainable doesn't matter: of the base all have to be there where
    the artefact was written with all, else none.

    Args:
        model: folded, with LoRA if the artefact has it.
        path: the safetensors file.
        config: of the artefact.
        fresh: endings of parameter names that may be missing there, and then stay as they are.

    Raises:
        ValueError: as `load_trainable_state`.
    """
    state = _read_state(path)
    # Artefacts of older versions don't say it; without adapters those with base weights have all.
    guess = not config["lora_rank"] and not all(_is_added(name) for name in state)
    whole = config.get(ALL_WEIGHTS, guess)
    expected = {name for name, _ in model.named_parameters() if whole or _is_added(name)}
    expected = {name for name in expected if not name.endswith(tuple(fresh))}
    _copy_state(model, path, state, expected)
    folded: Any = model
    folded._cachefold_loaded = frozenset(state)


def _is_added(name: str) -> bool:
    """Whether a parameter is no weight of the base model."""
    return "lora_" in name or ".decision." in name


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"can't read {path}: {error}") from error


def _copy_state(
    model: PreTrainedModel, path: Path, state: dict[str, Tensor], expected: set[str]
) -> None:
    """Copies a state read from `path`, in which every name expected has to be."""
    parameters = dict(model.named_parameters())
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
