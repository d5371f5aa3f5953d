"""Where the artefact of a policy is, and which command makes one that is missing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cachefold.models.hub import CONFIG

POOLED = "gqa"  # the policy that does nothing but pool kv heads


def find_artefact(policy: str, cr: float | None, base: str, folders: Sequence[Path]) -> Path:
    """The artefact of a policy at a ratio (None = it has none), for the base that is compared.

    One that another was trained on from gives way to that; of others, one made for the ratio comes
    before a dial that covers it, and of dials the one with the widest range. One that pools kv
    heads besides is another method, which only its folder names.

    Raises:
        ValueError: none, with the command that makes it; several; or several and a recipe that
            can't be read, so that none gives way.
    """
    ratios: set[float] = set()
    for folder in folders:
        found: list[Path] = []
        dials: dict[Path, float] = {}
        for place, config in artefacts(folder):
            made = config["policy"]
            if made["name"] != policy or not same_base(config["base"]["id"], base):
                continue
            if made.get("kv_heads") and policy != POOLED:
                continue
            ratio, most = made.get("cr"), made.get("max_cr")
            ratios |= set() if ratio is None else {most or ratio}
            if most is not None and cr is not None:
                dials |= {place: most} if cr <= most else {}
            elif ratio == cr:
                found.append(place)
        best = _best(found, dials)
        if len(best) > 1:
            raise ValueError(
                f"several artefacts are {policy}{_at(cr)}: {', '.join(map(str, best))}; name the "
                "folder that is meant"
            )
        if best:
            return best[0]
    there = f" (there: cr {', '.join(f'{r:g}' for r in sorted(ratios))})" if ratios else ""
    raise ValueError(
        f"{policy} is learned, and {' and '.join(map(str, folders))} have no artefact of it"
        f"{_at(cr)} for {base}{there}. Make one: {_command(policy, cr, base)}"
    )


def _best(found: list[Path], dials: dict[Path, float]) -> list[Path]:
    """Those that are meant, of artefacts for a ratio and of dials with their largest ratios."""
    last = _not_trained_on([*found, *dials])
    widest = max((dials[place] for place in last if place in dials), default=None)
    made_for_it = [place for place in last if place in found]
    return made_for_it or [place for place in last if dials[place] == widest]


def _not_trained_on(places: list[Path]) -> list[Path]:
    """Those of the artefacts that no other of them was trained on from; one alone stays.

    Raises:
        ValueError: of several, one has a recipe that can't be read.
    """
    if len(places) < 2:
        return places
    inits = {name_of(init) for init in map(_init, places) if init is not None}
    return [place for place in places if name_of(place) not in inits]


def _init(place: Path) -> Path | None:
    """What an artefact was trained on from; None = the base model, or it came without a recipe."""
    path = place / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError("not a recipe: no keys with values")
        init = recipe.get("init")
        if not isinstance(init, str | None):
            raise ValueError(f"not a recipe: init is {init!r}, which is no folder")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} can't be read: {error}. It says what {place} was trained on from, which "
            "decides between several artefacts of one policy: mend it, or name the folder that is "
            "meant"
        ) from error
    return Path(init) if init else None


def name_of(folder: Path) -> str:
    """Name of an artefact: a run keeps its own in `final`.

    >>> name_of(Path("runs/first/final"))
    'first'
    """
    return folder.parent.name if folder.name == "final" else folder.name


def _at(cr: float | None) -> str:
    return "" if cr is None else f" at cr {cr:g}"


def artefacts(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders of artefacts with their configs; broken ones are for `cachefold ls artefacts`."""
    for path in sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/final/{CONFIG}")]):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config["policy"]["name"] and config["base"]["id"]:
                yield path.parent, config
        except (ValueError, KeyError, TypeError):
            continue


def _command(policy: str, cr: float | None, base: str) -> str:
    """The retrofit that gives what is missing, from the recipe that is most like it."""

    def unlike(recipe: tuple[Path, dict[str, Any]]) -> tuple[bool, ...]:
        values, made = recipe[1], recipe[1]["policy"]
        pools = bool(made.get("kv_heads")) and policy != POOLED
        fits = values["model"] == base, made.get("name") == policy
        return pools, *(not fit for fit in fits), "max_cr" in made, "init" in values

    name = f"{Path(base).name}-{policy}"
    changes = [f"model={base}", f"policy.name={policy}"]
    if cr is not None:
        name += f"-cr{cr:g}"
        changes.append(f"policy.cr={cr:g}")
    recipe = min(_recipes(), key=unlike, default=(Path("RECIPE.yaml"), {}))[0]
    return f"`cachefold retrofit {recipe} {' '.join(changes)} output_dir=runs/{name}`"


def _recipes() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Recipes that can be read, by name."""
    for path in sorted(Path("recipes").glob("*.yaml")):
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            if values["model"] and values["policy"]["name"]:
                yield path, values


def same_base(one: str, other: str) -> bool:
    """Whether two names mean one base model.

    >>> same_base("smollm2-135m", "smollm2-135m")
    True
    """
    folders = Path(one).is_dir() and Path(other).is_dir()
    return one == other or (folders and Path(one).resolve() == Path(other).resolve())
