"""`cachefold ls`: what there is to work with."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cachefold.cli._places import CONFIG, REPOSITORY, list_artefacts, list_recipes
from cachefold.core.names import closest

KINDS = ("models", "policies", "codecs", "tasks", "backends", "artefacts", "recipes")


def run(
    what: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")],
) -> None:
    """List models, policies, codecs, tasks, attention backends, artefacts or recipes."""
    if what not in KINDS:
        raise ValueError(f"can't list {what!r}.{closest(what, KINDS)} Kinds: {', '.join(KINDS)}.")
    rows = {
        "models": _models, "policies": _policies, "codecs": _codecs, "tasks": _tasks,
        "backends": _backends, "artefacts": _artefacts, "recipes": _recipes,
    }[what]()  # fmt: skip
    lines = list(rows)
    if not lines:
        print(f"no {what} found below {Path.cwd()}, nor below {REPOSITORY}")
    width = max((len(name) for name, _ in lines), default=0)
    for name, about in lines:
        print(f"{name.ljust(width)}  {about}".rstrip())


def _models() -> Iterable[tuple[str, str]]:
    from cachefold.models.families import SUPPORTED
    from cachefold.zoo import BASES

    yield from ((name, BASES[name].hub_id) for name in sorted(BASES))
    yield "FOLDER or HUB/ID", f"any model of these families: {', '.join(SUPPORTED)}"


def _policies() -> Iterable[tuple[str, str]]:
    from dataclasses import fields

    from cachefold.policies import list_policies, policy_class

    for name in list_policies():
        policy = policy_class(name)
        options = ", ".join(f"{field.name}={field.default}" for field in fields(policy))
        about = (policy.__doc__ or "").strip().splitlines()[0]
        yield name, f"{about} Options: {options or 'none'}"


def _codecs() -> Iterable[tuple[str, str]]:
    from cachefold.cache.codecs import describe_codecs

    yield from describe_codecs().items()


def _tasks() -> Iterable[tuple[str, str]]:
    from cachefold.evaluation.task import get_task, list_tasks

    for name in list_tasks():
        task = get_task(name)
        about = (type(task).__doc__ or "").strip().splitlines()[0]
        sized = f" Lengths: {name}@4096 and so on." if hasattr(task, "at") else ""
        yield name, f"{task.metric}; {about}{sized}"


def _backends() -> Iterable[tuple[str, str]]:
    from cachefold.attention.dispatch import list_backends

    for name, (ok, reason) in list_backends().items():
        yield name, "yes" if ok else f"no: {reason}"


def _artefacts() -> Iterable[tuple[str, str]]:
    for folder in list_artefacts().values():
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            about = _about_artefact(config)
        except (ValueError, KeyError, TypeError) as error:
            about = f"can't be read: {error}"
        yield str(folder), about


def _about_artefact(config: dict[str, Any]) -> str:
    policy, cr = config["policy"], config.get("cr")
    most, ratio = policy.get("max_cr"), policy.get("cr")
    served = "" if ratio is None else f" cr {ratio}"
    if most is not None:
        served = f" dial 1 to {most:g}, set to {ratio:g}"
    measured = f", measured {cr:.2f}" if cr else ""
    return f"{config['base']['id']}, {policy['name']}{served}{measured}"


def _recipes() -> Iterable[tuple[str, str]]:
    for path in list_recipes().values():
        yield str(path), _first_sentence(path.read_text(encoding="utf-8"))


def _first_sentence(recipe: str) -> str:
    """Of the comment that a recipe begins with, which goes over several lines."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    text = " ".join(line.strip("# ") for line in comment)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].strip()
