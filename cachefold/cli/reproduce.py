"""`cachefold reproduce`: a shipped retrofit again, from its recipe to its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.core.names import closest

if TYPE_CHECKING:
    from cachefold.retrofit.config import RetrofitConfig


def run(
    name: Annotated[str, typer.Argument(help="Of a shipped retrofit, such as smollm2-135m-cr2.")],
    shipped: Annotated[
        bool, typer.Option("--shipped", help="Measure the shipped weights; train nothing.")
    ] = False,
    cr: Annotated[
        str, typer.Option(help="Ratios of a dial to measure; without, the artefact's own.")
    ] = "",
    pieces: Annotated[int, typer.Option(min=1, help="Most pieces of each held-out file.")] = 12,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 1024,
    out: Annotated[
        Path, typer.Option(help="Folder of the run, which goes on where it stopped.")
    ] = Path("runs/reproduce"),
) -> None:
    """Run a recipe again, measure the result and print it beside what is shipped."""
    from cachefold.cli._artefact import find
    from cachefold.evaluation.naming import check_ratio

    recipe, folder = _find(name)
    ratios: list[float | None] = [
        check_ratio(word.strip()) for word in cr.split(",") if word.strip()
    ]
    out = out / name
    if not shipped:
        folder = _train(recipe, out)
    from cachefold.evaluation.heldout import measure_artefact
    from cachefold.retrofit.card import HELDOUT

    place = out if shipped else folder  # beside new weights, where `cachefold card` looks for it
    place.mkdir(parents=True, exist_ok=True)
    tables: list[dict[str, Any]] = []
    for ratio in ratios or [None]:
        tables.append(
            measure_artefact(folder, cr=ratio, pieces=pieces, tokens=tokens, progress=print)
        )
        (place / HELDOUT).write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
    print(f"written: {place / HELDOUT}")
    _compare(find(Path("artefacts") / name), tables)


def _find(name: str) -> tuple[Path, Path]:
    """Recipe and artefact of a shipped retrofit."""
    from cachefold.cli._artefact import find

    recipes, artefacts = find(Path("recipes")), find(Path("artefacts"))
    both = sorted({p.stem for p in recipes.glob("*.yaml")} & {p.name for p in artefacts.glob("*")})
    if name not in both:
        raise ValueError(
            f"no shipped retrofit {name!r}.{closest(name, both)} With recipe and artefact: "
            f"{', '.join(both) or 'none; run this inside a clone of the repository'}"
        )
    return recipes / f"{name}.yaml", artefacts / name


def _train(recipe: Path, output: Path) -> Path:
    from cachefold.retrofit.config import load_recipe
    from cachefold.retrofit.run import FINAL, run_retrofit

    config: RetrofitConfig = load_recipe(recipe, [f"output_dir={output}"])
    if not (output / FINAL / "cachefold.json").is_file():
        run_retrofit(config, resume=(output / "recipe.yaml").is_file())
    return output / FINAL


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
                print(
                    f"shipped, cr {new['cr']:g}: mean increase {old['mean_increase']:+.4f} as "
                    f"recorded, {new['mean_increase']:+.4f} measured now"
                )
