"""`cachefold eval`: methods side by side, quality against bytes."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.cli._places import find
from cachefold.evaluation.settings import DEFAULT_MODEL, EvalSettings

if TYPE_CHECKING:
    from cachefold.evaluation.compare import Comparison
    from cachefold.evaluation.methods import Method

OUT = Path("runs/eval")
DATA = Path("data/heldout")
AGAINST, CR, CODEC = "dense", "2", "none"


def run(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Zoo name, folder or hub id; or the folder of an artefact.")
    ] = DEFAULT_MODEL,
    against: Annotated[
        str,
        typer.Option(
            help="Policies and artefact folders, each also as NAME+CODEC: dense,tova,full+int4."
        ),
    ] = AGAINST,
    cr: Annotated[
        str, typer.Option(help="Tokens / entries of policies by name and of dials, such as 2,4,8.")
    ] = CR,
    codec: Annotated[
        str, typer.Option(help="For methods that name none: `none`, int4, int4,int2 ...")
    ] = CODEC,
    tasks: Annotated[str, typer.Option(help="Names with commas between; none if empty.")] = "",
    limit: Annotated[
        int | None, typer.Option(help="Most rows of each task, or prompts to make.")
    ] = None,
    pieces: Annotated[int, typer.Option(help="Most held-out pieces of each file.")] = 6,
    tokens: Annotated[int, typer.Option(help="Tokens of a piece.")] = 1024,
    context: Annotated[
        int, typer.Option(help="Tokens in the cache whose bytes and speed are measured.")
    ] = 2048,
    data: Annotated[Path, typer.Option(help="Folder of held-out text.")] = DATA,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch_size: Annotated[str, typer.Option(help="Texts side by side, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of policies that draw.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report and of finished work, which is kept.",
            show_default=f"{OUT}; with --from that of the report",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Make table and picture of an eval.json again; measures nothing."
        ),
    ] = None,
) -> None:
    """Compare methods at equal memory: held-out loss, tasks, bytes of the cache, speed."""
    if source is not None:
        _refuse_beside_from(ctx)
        _again(source, out)
        return
    size: Any = batch_size if batch_size == "auto" else _number("--batch-size", batch_size, int)
    settings = EvalSettings(
        dtype=dtype, batch_size=size, limit=limit, pieces=pieces, tokens=tokens, context=context,
        seed=seed,
    )  # fmt: skip
    asked = {
        "against": against, "cr": cr, "codec": codec, "tasks": tasks, "data": str(data),
        "out": str(out or OUT),
    }  # fmt: skip
    _compare(model, settings, asked)


def _compare(model: str, settings: EvalSettings, asked: dict[str, str]) -> None:
    import torch
    from transformers.utils import logging as hub_logging

    from cachefold.benchmark.machine import environment
    from cachefold.evaluation.compare import Comparison

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    hub_logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    base, methods, notes = _methods(model, asked)
    comparison = Comparison(
        _with_model(settings, base), methods, _names(asked["tasks"]),
        files=_files(Path(asked["data"])), out=Path(asked["out"]),
        facts={"command": command_of(model, settings, asked), "environment": environment()},
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    comparison.report["notes"] += notes
    for note in notes:
        comparison.progress(note)
    try:
        complete = comparison.run()
    finally:
        _show(comparison)
    if not complete:
        raise typer.Exit(1)


def _methods(model: str, asked: dict[str, str]) -> tuple[str, list[Method], list[str]]:
    """The base model, the methods that were named, and what to know of their ratios."""
    from cachefold.evaluation.naming import (
        Naming,
        codecs_of,
        is_artefact,
        of_one_ratio,
        parse_methods,
    )
    from cachefold.models.hub import read_config

    words = [_found(word) for word in _names(asked["against"])]
    folder = find(Path(model))
    base = model
    if is_artefact(folder):
        base = str(read_config(folder)["base"]["id"])
        words = [str(folder), *words]
    else:
        _check_place(model)
    naming = Naming(
        base=base,
        crs=_ratios(asked["cr"]),
        codecs=codecs_of(_names(asked["codec"])),
        folders=(find(Path("artefacts")), Path("runs")),
    )
    methods = parse_methods(words, naming)
    # The usual ratio is there for policies by name; nobody need have asked for it.
    notes = of_one_ratio(words, methods, naming.crs, strict=asked["cr"] != CR)
    return base, methods, notes


def _found(word: str) -> str:
    """A word of --against; the folder of an artefact, with a codec or without, as it is found."""
    from cachefold.evaluation.naming import is_artefact

    folder, plus, codec = word.rpartition("+")
    for name, rest in ((word, ""), (folder, plus + codec)):
        if name and is_artefact(find(Path(name))):
            return f"{find(Path(name))}{rest}"
    return word


def _check_place(model: str) -> None:
    """Refuses a folder that isn't there; what looks like a hub id passes, but not among artefacts.

    Raises:
        ValueError: no such folder, with the closest artefact.
    """
    from cachefold.core.names import closest
    from cachefold.evaluation.finding import artefacts

    path = Path(model)
    if "/" not in model or find(path).exists():
        return
    folder = path.parent.parent if path.name == "final" else path.parent
    there = find(folder)
    near = [str(folder / place.relative_to(there)) for place, _ in artefacts(there)]
    if near or path.is_absolute() or len(path.parts) != 2 or path.parts[0] == "..":
        raise ValueError(
            f"there is no artefact or model at {model}.{closest(model, near)} `cachefold ls "
            "artefacts` shows the artefacts nearby"
        )


def _with_model(settings: EvalSettings, base: str) -> EvalSettings:
    from dataclasses import replace

    return replace(settings, model=base)


def _ratios(text: str) -> tuple[float, ...]:
    from cachefold.evaluation.naming import check_ratio

    return tuple(dict.fromkeys(check_ratio(word) for word in _names(text) or [""]))


def _number(option: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{option} takes numbers, such as 2; got {text!r}") from error


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _files(folder: Path) -> list[Path]:
    folder = find(folder)
    kinds = ("*.jsonl", "*.jsonl.gz", "*.txt", "*.txt.gz")
    files = sorted(path for kind in kinds for path in folder.glob(kind))
    if not files:
        raise ValueError(f"--data {folder} has no file of held-out text ({', '.join(kinds)})")
    return files


def _show(comparison: Comparison) -> None:
    from cachefold.evaluation.report import markdown

    if comparison.report["rows"] or comparison.report["failures"]:
        print(markdown(comparison.report), flush=True)
        print(f"report written to {comparison.out}", file=sys.stderr)
    for one in comparison.report["failures"]:
        print(f"error: {one['method']}, {one['part']}: {one['reason']}", file=sys.stderr)


def _refuse_beside_from(ctx: typer.Context) -> None:
    """Refuses what a report that is there can't follow any more."""
    given = []
    for one in ctx.command.params:
        origin = ctx.get_parameter_source(str(one.name))
        if one.name not in ("source", "out") and origin and origin.name == "COMMANDLINE":
            given.append(one.opts[0] if one.param_type_name == "option" else "MODEL")
    if given:
        raise ValueError(
            f"--from shows a report as it was measured, so that {', '.join(given)} can't be given "
            "with it, only --out: leave out --from to measure, or the others to show the report"
        )


def _again(source: Path, out: Path | None) -> None:
    """Table and picture of a report that is there."""
    from cachefold.evaluation.report import markdown, note_picture, read, write
    from cachefold.writable import check_writable

    report = read(source)
    folder = out or (source if source.is_dir() else source.parent)
    check_writable(folder)
    picture = note_picture(report)
    print(markdown(report))
    for path in write(report, folder, picture=picture):
        print(f"written: {path}", file=sys.stderr)


def command_of(model: str, settings: EvalSettings, asked: dict[str, str]) -> str:
    """The command that measures the same again.

    >>> command_of("smollm2-135m", EvalSettings(limit=5), {"against": "tova", "cr": "2"})
    'cachefold eval --against tova --limit 5'
    """
    usual = {
        "against": AGAINST, "cr": CR, "codec": CODEC, "tasks": "", "data": str(DATA),
        "out": str(OUT),
    }  # fmt: skip
    default = EvalSettings()
    words = [] if model == DEFAULT_MODEL else [model]
    for name, value in asked.items():
        if value != usual[name]:
            words += [f"--{name}", value]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name != "model" and value != getattr(default, field.name):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(["cachefold", "eval", *words])
