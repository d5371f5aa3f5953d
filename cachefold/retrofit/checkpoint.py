"""Checkpoints: whole or absent, finite, and the rules for output folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from cachefold.retrofit.config import RetrofitConfig, load_recipe
from cachefold.writable import check_writable

WEIGHTS = "trainable.safetensors"
RECIPE = "recipe.yaml"
WRITING = "writing"
"""Folder a checkpoint is written in before it gets its name."""


class RetrofitDivergedError(RuntimeError):
    """Loss, gradient or weights are not finite any more; checkpoints written before are kept."""

    def __str__(self) -> str:
        """What happened, and what to do.

        The advice is added here and not to `args`, from which an error that comes out of another
        process is built anew: it would be there twice.
        """
        return (
            f"{super().__str__()}; checkpoints so far are kept. Lower train.learning_rate, or set "
            "train.dtype: float32, and start again."
        )


def check_finite(state: Mapping[str, Tensor], step: int) -> None:
    """Refuses weights that must not be written.

    Args:
        state: tensors by name.
        step: optimiser steps done, for the message.

    Raises:
        RetrofitDivergedError: a value is NaN or infinite.
    """
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise RetrofitDivergedError(
                f"{name} is not finite after step {step}, so it was not written"
            )


def publish(written: Path, final: Path) -> None:
    """Gives a completely written folder its final name, after its bytes are on disk."""
    for path in [*written.rglob("*"), written]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        shutil.rmtree(final)
    os.replace(written, final)


def check_output(config: RetrofitConfig, resume: bool) -> None:
    """Checks the output folder; changes nothing.

    Args:
        config: the recipe.
        resume: continue the run that lies there.

    Raises:
        ValueError: the folder can't be written to, or holds something and `resume` is off, or
            `resume` is on and it holds no run or the run of another recipe.
    """
    folder = Path(config.output_dir)
    check_writable(folder, "output_dir", "choose another output_dir")
    if not resume:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"output_dir {folder} is not empty; pass --resume to continue the run there, or "
                "choose another output_dir"
            )
        return
    stored = folder / RECIPE
    if not stored.is_file():
        raise ValueError(
            f"no run to resume in {folder}: {RECIPE} is missing; leave --resume out to start one"
        )
    if _result(load_recipe(stored)) != _result(config):
        raise ValueError(
            f"the run in {folder} had another recipe than this one (compare {stored}); go on "
            "with the same recipe and changes, or choose another folder"
        )


def claim_output(config: RetrofitConfig) -> str | None:
    """Makes the output folder and writes the recipe there, once nothing can fail any more.

    Returns:
        Folder of the last checkpoint; None to start from the beginning.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (RECIPE + ".part")
    partial.write_text(config.to_yaml(), encoding="utf-8")
    os.replace(partial, folder / RECIPE)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    last: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    return last


def _result(config: RetrofitConfig) -> RetrofitConfig:
    """The recipe without what changes no weight, so that resuming may change it."""
    train = replace(config.train, save_every=1, log_every=1, tensorboard=False)
    return replace(config, output_dir="", train=train)
