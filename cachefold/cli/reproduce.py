"""`cachefold reproduce`: a retrofit of the repository again, from its recipe to its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.cli._places import ARTEFACTS, RECIPES, find, find_recipe, recipe_name
from cachefold.writable import check_writable

if TYPE_CHECKING:
    from cachefold.retrofit.config import RetrofitConfig


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
            help="Folder to train in, where a run goes on, or with --shipped for the table; "
            "without, one in runs/reproduce. Changes need it."
        ),
    ] = None,
) -> None:
    """Run a recipe again, measure the result and print it beside what is shipped."""
    from cachefold.retrofit.config import load_recipe

    recipe, name = _find(name)
    artefact = find(ARTEFACTS / name)
    _check_changes(overrides or [], shipped, out)
    out = out or Path("runs/reproduce") / (f"{name}-shipped" if shipped else name)
    config = replace(load_recipe(recipe, overrides or []), output_dir=str(out))
    ratios = asked_ratios(cr, config)
    if shipped:
        _check_shipped(artefact, out)
    folder = artefact if shipped else _train(config)
    # Beside new weights, where `cachefold card` looks for it.
    tables = _measure(folder, ratios, pieces, tokens, out if shipped else folder)
    if artefact.is_dir() and not overrides:
        _compare(artefact, tables)


def _find(name: str) -> tuple[Path, str]:
    """A recipe, and its name in the folder of recipes: a result of it may be shipped."""
    recipe = find_recipe(Path(name))
    own = recipe_name(recipe)
    if own is None:
        raise ValueError(
            f"{name} is not in {RECIPES}, so that nothing is recorded of it; `cachefold retrofit "
            f"{name}` trains it"
        )
    return recipe, own


def _check_changes(overrides: list[str], shipped: bool, out: Path | None) -> None:
    """Changes make another model than the recipe's, in a folder of its own."""
    if overrides and shipped:
        raise ValueError(
            f"--shipped measures weights as they are: leave out --shipped or {' '.join(overrides)}"
        )
    if overrides and out is None:
        raise ValueError(
            "changes make another model than the recipe's, which needs a folder of its own: add "
            "--out, such as --out runs/mine"
        )
    if any(change.startswith("output_dir=") for change in overrides):
        raise ValueError("the folder of the run is that of --out; leave output_dir out")


def _check_shipped(artefact: Path, out: Path) -> None:
    """There are weights, and a folder for their table that has no others in it."""
    if not artefact.is_dir():
        raise ValueError(
            f"{artefact.name} has a recipe, but its weights are not shipped: leave --shipped out "
            "to train it; `cachefold ls artefacts` shows what is shipped"
        )
    check_writable(out)
    if (out / "recipe.yaml").exists():
        raise ValueError(
            f"{out} is a run or an artefact; name another folder for the table with --out"
        )


def asked_ratios(words: str, config: RetrofitConfig) -> list[float | None]:
    """Ratios of a dial to measure, checked now and not after hours of training.

    Args:
        words: as --cr has them, such as "2,4,8".
        config: the recipe.

    Returns:
        The ratios; none of them where the artefact's own is meant.

    Raises:
        ValueError: no ratio, or one that the recipe's model will not serve.
    """
    from cachefold.evaluation.naming import check_ratio
    from cachefold.models.dial import has_dial

    ratios: list[float | None] = [
        check_ratio(word.strip()) for word in words.split(",") if word.strip()
    ]
    policy: Any = config.build_policy()
    if ratios and not has_dial(policy):
        if set(ratios) == {policy.cr}:
            return []
        raise ValueError(
            f"--cr {words} turns a dial, and this recipe makes a model for one ratio, "
            f"{policy.cr:g}: leave --cr out"
        )
    if any(ratio is not None and ratio > policy.max_cr for ratio in ratios):
        raise ValueError(f"this dial serves ratios from 1 to {policy.max_cr:g}; got --cr {words}")
    return ratios


def _train(config: RetrofitConfig) -> Path:
    from cachefold.cli.retrofit import train
    from cachefold.retrofit.checkpoint import check_output
    from cachefold.retrofit.run import FINAL

    output = Path(config.output_dir)
    check_writable(output)  # as --out, which it was asked for by
    begun = (output / "recipe.yaml").is_file()
    artefact = (output / "cachefold.json").is_file()
    if artefact or (not begun and output.is_dir() and any(output.iterdir())):
        raise ValueError(
            f"{output} holds something else than a run and is left as it is; name another folder "
            "with --out"
        )
    check_output(config, resume=begun)  # also that a finished run is one of this recipe
    if not (output / FINAL / "cachefold.json").is_file():
        train(config, resume=begun)
    return output / FINAL


def _measure(
    folder: Path, ratios: list[float | None], pieces: int, tokens: int, place: Path
) -> list[dict[str, Any]]:
    """Measures each ratio; what is done is written, should a later one fail.

    Tables that the artefact has of other ratios and sizes stay.
    """
    from cachefold.evaluation.heldout import measure_artefact
    from cachefold.evaluation.report import replace as write
    from cachefold.models.hub import artefact_digest
    from cachefold.retrofit.card import HELDOUT

    path, made_of = place / HELDOUT, artefact_digest(folder)
    known = _kept(path, made_of, beside=place == folder)
    place.mkdir(parents=True, exist_ok=True)
    new: list[dict[str, Any]] = []
    for ratio in ratios or [None]:
        table = measure_artefact(folder, cr=ratio, pieces=pieces, tokens=tokens, progress=print)
        new.append(table | {"artefact": made_of})
        known[_size(table)] = new[-1]
        tables = [known[size] for size in sorted(known)]
        write(path, json.dumps(tables, indent=2) + "\n")
    print(f"written: {path}")
    return new


def _kept(path: Path, made_of: str, beside: bool) -> dict[tuple[float, int, int], dict[str, Any]]:
    """Tables that are there already, by ratio and size.

    Those that don't say what they were made of belong to the weights they lie beside.
    """
    if not path.exists():
        return {}
    try:
        known = {_size(table): table for table in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error!r}): move it away") from error
    unknown = made_of if beside else None
    if any(table.get("artefact", unknown) != made_of for table in known.values()):
        raise ValueError(
            f"{path} has tables of another artefact, or of this one before its weights or its "
            "calibration changed: move it away"
            + ("" if beside else ", or name another folder with --out")
        )
    return known


def _size(table: dict[str, Any]) -> tuple[float, int, int]:
    """What tells the tables of one artefact apart."""
    return table["cr"], table["pieces"], table["tokens"]


def _compare(shipped: Path, tables: list[dict[str, Any]]) -> None:
    """Prints the recorded table of the artefact beside the new one."""
    from cachefold.retrofit.card import HELDOUT

    path = shipped / HELDOUT
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    known = {_size(old): old for old in recorded}
    for new in tables:
        old = known.get(_size(new))
        if old is None:
            sizes = [f"cr {cr:g} with --pieces {p} --tokens {t}" for cr, p, t in known]
            print(
                f"cr {new['cr']:g} not compared; recorded of what is shipped: "
                f"{', '.join(sizes) or 'nothing'}"
            )
            continue
        before, now = old["machine"], new["machine"]
        print(
            f"shipped, cr {new['cr']:g}: mean increase {old['mean_increase']:+.4f} as "
            f"recorded, {new['mean_increase']:+.4f} measured now"
            + (f" (on {before} then, on {now} now)" if before != now else "")
        )
