"""`cachefold bench`: speed and memory beside dense transformers."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefold.benchmark.config import DEFAULT_MODEL, PARTS, BenchConfig, numbers

if TYPE_CHECKING:
    from cachefold.benchmark.run import Run

OPTIONS = (
    "batch", "context", "cr", "backend", "dtype", "repeats", "steps", "threads", "seed",
)  # fmt: skip


def run(
    model: Annotated[
        str, typer.Argument(help="Zoo name, folder or hub id of a dense model.")
    ] = DEFAULT_MODEL,
    attention: Annotated[
        bool, typer.Option("--attention", help="The decode attention call alone (the default).")
    ] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Decoding, whole model.")] = False,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Reading prompts: time and peak memory.")
    ] = False,
    llama: Annotated[
        bool, typer.Option("--llama", help="llama.cpp on the same model, as an outside anchor.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="All four.")] = False,
    batch: Annotated[str | None, typer.Option(help="Requests side by side, such as 1,8.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens per request: 512,8192.")] = None,
    cr: Annotated[
        str | None, typer.Option(help="Imposed tokens / entries, such as 1,2,4,8.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or one of `cachefold ls backends`.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="The faster one counts; --attention takes the first.")
    ] = "bfloat16,float32",
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens per round of --generate.")] = 8,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    proportional: Annotated[
        bool, typer.Option("--proportional", help="Entries weigh what they hold: one channel more.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of entries, decisions and token ids.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for rows, environment, command.")] = None,
    csv: Annotated[Path | None, typer.Option(help="File for the rows.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture (matplotlib).")] = None,
) -> None:
    """Measure speed and memory of folded caches at imposed ratios, dense models beside them."""
    asked = dict(zip(PARTS, (attention, generate, prefill, llama), strict=True))
    parts = tuple(part for part in PARTS if everything or asked[part]) or ("attention",)
    config = BenchConfig(
        model=model, parts=parts, backend=backend, dtype=tuple(dtype.split(",")),
        batch=numbers("--batch", batch, int), context=numbers("--context", context, int),
        cr=numbers("--cr", cr, float), repeats=repeats, steps=steps, threads=threads,
        proportional=proportional, seed=seed,
    )  # fmt: skip
    _run(config, json, csv, plot)


def _run(config: BenchConfig, json: Path | None, csv: Path | None, plot: Path | None) -> None:
    import torch
    from transformers.utils import logging as hub_logging

    from cachefold.benchmark.run import Run, to_stderr

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    hub_logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    run = Run(
        config, command_of(config), json_path=json, csv_path=csv, plot_path=plot,
        progress=to_stderr,
    )  # fmt: skip
    try:
        complete = run.measure()
    finally:
        if run.report.rows or run.report.notes:
            print(run.report.markdown(), flush=True)
    _end(run, complete)


def _end(run: Run, complete: bool) -> None:
    for one in run.report.failures:
        print(f"error: {one['part']}: {one['reason']}", file=sys.stderr)
    if not complete:
        raise typer.Exit(1)


def command_of(config: BenchConfig) -> str:
    """The command that measures the same again.

    >>> command_of(BenchConfig(parts=("attention",), cr=(1.0, 4.0), threads=2))
    'cachefold bench --attention --cr 1,4 --threads 2'
    """
    default = BenchConfig(parts=config.parts)
    words = [] if config.model == default.model else [config.model]
    words += ["--all"] if config.parts == PARTS else [f"--{part}" for part in config.parts]
    words += ["--proportional"] if config.proportional else []
    for name in OPTIONS:
        value = getattr(config, name)
        if value != getattr(default, name):
            listed = value if isinstance(value, tuple) else (value,)
            words += [
                f"--{name}",
                ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in listed),
            ]
    return shlex.join(["cachefold", "bench", *words])
