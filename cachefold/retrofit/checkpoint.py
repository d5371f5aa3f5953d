"""Checkpoints: whole or absent, and the rules for output folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

WEIGHTS = "trainable.safetensors"
RECIPE = "recipe.yaml"
WRITING = "writing"
"""Folder a checkpoint is written in before it gets its name."""


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


def prepare_output(folder: Path, recipe: str, resume: bool) -> str | None:
    """Makes the output folder and finds what to resume.

    Args:
        folder: output folder.
        recipe: the resolved recipe, YAML.
        resume: continue the run that lies there.

    Returns:
        Folder of the last checkpoint; None to start from the beginning.

    Raises:
        ValueError: the folder holds something and `resume` is off, or holds another recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; choose another")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise ValueError(
            f"output_dir {folder} is not empty; pass --resume to continue the run there, or "
            "choose another output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / RECIPE
    if stored.is_file() and stored.read_text(encoding="utf-8") != recipe:
        raise ValueError(
            f"the run in {folder} had another recipe than this one (compare {stored}); resume "
            "with the same recipe and overrides, or choose another output_dir"
        )
    partial = folder / (RECIPE + ".part")
    partial.write_text(recipe, encoding="utf-8")
    os.replace(partial, stored)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    last: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    return last
