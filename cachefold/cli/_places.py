"""Where artefacts and recipes lie, here or beside the code, for all verbs alike. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from cachefold.core.names import closest

REPOSITORY = Path(__file__).parents[2]
ARTEFACTS, RECIPES, RUNS = Path("artefacts"), Path("recipes"), Path("runs")
CONFIG, FINAL = "cachefold.json", "final"


def find(path: Path) -> Path:
    """The path from the working folder, else the same beside the code."""
    beside = REPOSITORY / path
    return beside if not path.exists() and beside.exists() else path


def list_artefacts() -> dict[Path, Path]:
    """Folders of artefacts by the path that means them; what lies here hides what lies beside."""
    configs = _all(*(f"{place}/{CONFIG}" for place in ("artefacts/*", "runs/*", "runs/*/final")))
    return {name.parent: path.parent for name, path in configs.items()}


def list_recipes() -> dict[Path, Path]:
    """Recipes by the path that means them; what lies here hides what lies beside the code."""
    return _all("recipes/*.yaml")


def find_artefact(word: Path) -> Path:
    """The folder of an artefact.

    Args:
        word: its path, or its name in `artefacts` or `runs`, where a run keeps it in `final`.

    Raises:
        ValueError: no artefact there.
    """
    for place in (Path(), ARTEFACTS, RUNS):
        for end in ("", FINAL):
            if (folder := find(place / word / end / CONFIG)).is_file():
                return folder.parent
    there = list_artefacts()
    names = [path.parent.name if path.name == FINAL else path.name for path in there]
    raise ValueError(
        f"{word} is no cachefold artefact: {CONFIG} is missing."
        f"{closest(str(word), [*names, *map(str, there)])} `cachefold ls artefacts` shows what "
        "there is; `cachefold retrofit` makes one (RUN/final)"
    )


def find_recipe(word: Path) -> Path:
    """The file of a recipe.

    Args:
        word: its path, or its name in `recipes`, without `.yaml`.

    Raises:
        ValueError: no recipe there.
    """
    for path in (find(word), find(RECIPES / f"{word}.yaml")):
        if path.is_file():
            return path
    there = list_recipes()
    names = [path.stem for path in there]
    raise ValueError(
        f"no recipe {str(word)!r}.{closest(str(word), [*names, *map(str, there)])} There are: "
        f"{', '.join(names) or 'none; run this inside a clone of the repository'}"
    )


def recipe_name(recipe: Path) -> str | None:
    """What a recipe is called in its folder of recipes; None where it lies in none."""
    for folder in (RECIPES, REPOSITORY / RECIPES):
        if recipe.resolve().is_relative_to(folder.resolve()):
            return recipe.resolve().relative_to(folder.resolve()).with_suffix("").as_posix()
    return None


def _all(*patterns: str) -> dict[Path, Path]:
    """Files here and beside the code, by their relative paths in order."""
    found: dict[Path, Path] = {}
    for root in (Path(), REPOSITORY):
        for pattern in patterns:
            for path in root.glob(pattern):
                found.setdefault(path.relative_to(root), path)
    return dict(sorted(found.items()))
