"""`cachefold reproduce`: a retrofit of the repository again, from its recipe to its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cachefold.core.names import closest


def run(
    name: Annotated[str, typer.Argument(help="Of a recipe, such as smollm2-135m-cr2.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as policy.cr=4; needs --out."),
    ] = None,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="Measure the shipped weights; train nothing.")
    ] = False,
    cr: Annotated[
        str, typer.Option(help="Ratios of a dial to measure; without, the artefact's own.")
    ] = "",
    pieces: Annotated[int, typer.Option(min=1, help="Most pieces of each held-out file.")] = 12,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 1024,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, which goes on where it stopped, or of the table; without, "
            "one in runs/reproduce."
        ),
    ] = None,
) -> None:
    """Run a recipe again, measure the result and print it beside what is shipped."""
    from cachefold.evaluation.naming import check_ratio

    recipe, artefact = _find(name)
    ratios: list[float | None] = [
        check_ratio(word.strip()) for word in cr.split(",") if word.strip()
    ]
    if overrides and (shipped or out is None):
        raise ValueError(
            "changes make another model than the shipped one: leave --shipped out and name a "
            "folder for it with --out"
        )
    if shipped and not artefact.is_dir():
        raise ValueError(
            f"{name} has a recipe, but its weights are not shipped: leave --shipped out to train it"
        )
    out = out or Path("runs/reproduce") / (f"{name}-shipped" if shipped else name)
    folder = artefact if shipped else _train(recipe, overrides or [], out)
    # Beside new weights, where `cachefold card` looks for it.
    tables = _measure(folder, ratios, pieces, tokens, out if shipped else folder)
    if not overrides:
        _compare(artefact, tables)


def _find(name: str) -> tuple[Path, Path]:
    """Recipe of a retrofit, and folder of its artefact where it is shipped."""
    from cachefold.cli._artefact import find

    recipe = find(Path("recipes") / f"{name}.yaml")
    if not recipe.is_file():
        names = sorted(path.stem for path in find(Path("recipes")).glob("*.yaml"))
        raise ValueError(
            f"no recipe {name!r}.{closest(name, names)} There are: "
            f"{', '.join(names) or 'none; run this inside a clone of the repository'}"
        )
    return recipe, find(Path("artefacts") / name)


def _train(recipe: Path, overrides: list[str], output: Path) -> Path:
    from cachefold.cli.retrofit import train
    from cachefold.retrofit.checkpoint import check_output
    from cachefold.retrofit.config import load_recipe
    from cachefold.retrofit.run import FINAL

    config = load_recipe(recipe, [*overrides, f"output_dir={output}"])
    begun = (output / "recipe.yaml").is_file()
    if not begun and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"{output} holds something else than a run; name another folder with --out"
        )
    check_output(config, resume=begun)  # also that a finished run is one of this recipe
    if not (output / FINAL / "cachefold.json").is_file():
        train(config, resume=begun)
    return output / FINAL


def _measure(
    folder: Path, ratios: list[float | None], pieces: int, tokens: int, place: Path
) -> list[dict[str, Any]]:
    """Measures each ratio; what is done is written, should a later one fail."""
    from cachefold.evaluation.heldout import measure_artefact
    from cachefold.retrofit.card import HELDOUT

    place.mkdir(parents=True, exist_ok=True)
    tables: list[dict[str, Any]] = []
    for ratio in ratios or [None]:
        tables.append(
            measure_artefact(folder, cr=ratio, pieces=pieces, tokens=tokens, progress=print)
        )
        (place / HELDOUT).write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
    print(f"written: {place / HELDOUT}")
    return tables


def _compare(shipped: Path, tables: list[dict[str, Any]]) -> None:
    """Prints the recorded table of the artefact beside the new one."""
    from cachefold.retrofit.card import HELDOUT

    path = shipped / HELDOUT
    if not path.is_file():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for old in recorded:
        for new in tables:
            if all(old[key] == new[key] for key in ("cr", "pieces", "tokens")):
                before, now = old.get("machine", "a machine of no name"), new["machine"]
                print(
                    f"shipped, cr {new['cr']:g}: mean increase {old['mean_increase']:+.4f} as "
                    f"recorded, {new['mean_increase']:+.4f} measured now"
                    + (f" (on {before} then, on {now} now)" if before != now else "")
                )
