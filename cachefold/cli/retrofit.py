"""`cachefold retrofit`: train a model to fold its cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.cli._places import find_recipe

if TYPE_CHECKING:
    from cachefold.retrofit.config import RetrofitConfig


def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML recipe, or its name in recipes; with --resume also the folder of a run."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as policy.cr=4."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print recipe and plan, try one pass and a checkpoint."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in output_dir.")
    ] = False,
) -> None:
    """Train a model to fold its cache, as a recipe says."""
    config = _config(recipe, overrides or [], resume)
    if dry_run:
        print(config.to_yaml())
    _show(train(config, resume=resume, dry_run=dry_run), dry_run, config.model)


def train(config: RetrofitConfig, *, resume: bool, dry_run: bool = False) -> dict[str, Any]:
    """Runs a retrofit for a verb; see `run_retrofit`.

    Raises:
        typer.Exit: it diverged; what happened is on stderr.
        ValueError: anything wrong with recipe, model, data or a file.
    """
    import torch
    from transformers.utils import logging

    from cachefold.retrofit.checkpoint import RetrofitDivergedError
    from cachefold.retrofit.run import run_retrofit

    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    try:
        return run_retrofit(config, resume=resume, dry_run=dry_run)
    except RetrofitDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except OSError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _config(recipe: Path, overrides: list[str], resume: bool) -> RetrofitConfig:
    """What the recipe says, or that of the run in the folder."""
    from cachefold.retrofit.config import load_recipe

    path = _recipe_path(recipe, resume)
    config = load_recipe(path, overrides)
    if recipe.is_dir() and Path(config.output_dir).resolve() != recipe.resolve():
        raise ValueError(
            f"the run in {recipe} was started with output_dir {config.output_dir}; resume from the "
            "working folder it was started in"
        )
    return config


def _recipe_path(recipe: Path, resume: bool) -> Path:
    if not recipe.is_dir():
        return find_recipe(recipe)
    if not resume:
        raise ValueError(f"{recipe} is a folder; add --resume to continue the run there")
    if not (recipe / "recipe.yaml").is_file():
        raise ValueError(f"no run to resume in {recipe}: recipe.yaml is missing")
    return recipe / "recipe.yaml"


def _show(facts: dict[str, Any], dry_run: bool, model: str) -> None:
    if not facts:
        print(
            f"the weights of {model} are not on this machine: recipe, shapes and folding were "
            "checked without them, no text was read and no pass was tried. "
            f"`hf download {model}` gets them"
        )
        return
    if dry_run:
        print(
            f"{facts['steps']:,} steps, {facts['tokens']:,} tokens from {facts['sequences']:,} "
            f"sequences, {facts['trainable']:,} trainable parameters\n"
            f"one forward and backward pass: loss {facts['loss']:.4f}, {facts['seconds']:.1f} s; "
            "a checkpoint was written and read back; nothing was trained"
        )
        return
    from cachefold.viz import compression_map_blocks, load_map

    print(compression_map_blocks(load_map(facts["folder"])))
