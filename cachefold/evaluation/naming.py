"""What names of methods stand for: policies by ratio, codecs, and artefacts where they lie."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cachefold.cache.codecs import get_codec
from cachefold.core.names import closest
from cachefold.evaluation.finding import artefacts, find_artefact, name_of, same_base
from cachefold.evaluation.methods import (
    DENSE,
    KEEP_ALL,
    Method,
    has_ratio,
    is_learned,
)
from cachefold.models.hub import CONFIG, read_config
from cachefold.policies import list_policies

NO_CODEC = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """What names stand for in one comparison."""

    base: str
    """Zoo name, folder or hub id of the dense model."""
    crs: tuple[float, ...] = (2.0,)
    """Ratios at which a policy by name is measured."""
    codecs: tuple[str | None, ...] = (None,)
    """For methods that name no codec of their own."""
    folders: tuple[Path, ...] = (Path("artefacts"), Path("runs"))
    """Where artefacts of a policy are sought, the first that has one wins."""


def parse_methods(words: Iterable[str], naming: Naming) -> list[Method]:
    """Turns names into methods; `dense` is always the first.

    Args:
        words: `dense`, a policy, a policy at a ratio of its own such as `tova-cr4`, or an artefact
            folder; each also as `NAME+CODEC`.
        naming: what they stand for.

    Raises:
        ValueError: unknown names, a learned policy without an artefact, an artefact of another
            base, or two methods of one name.

    >>> [method.name for method in parse_methods(["dense", "full+int4"], Naming(base="x"))]
    ['dense', 'full+int4']
    """
    methods = [Method(name=DENSE, policy=DENSE)]
    for word in words:
        name, codec = _split(word)
        codecs = naming.codecs if codec is None else (codec,)
        methods += itertools.chain.from_iterable(_named(name, one, naming) for one in codecs)
    unique: dict[tuple[Any, ...], Method] = {}
    for method in methods:
        place = method.artefact and method.artefact.resolve()
        same = (place, method.cr) if place else (method.policy, method.cr)
        unique.setdefault((*same, method.codec), method)
    names = [method.name for method in unique.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two different artefacts would both be called {twice[0]}: give one of their folders "
            "another name"
        )
    return list(unique.values())


def of_one_ratio(
    words: Iterable[str], methods: Sequence[Method], crs: tuple[float, ...], *, strict: bool
) -> list[str]:
    """Tells which folders among the words have one ratio, where others were asked for.

    Args:
        words: as `parse_methods` took them.
        methods: as it gave them.
        crs: ratios asked for.
        strict: refuse such a folder where nothing is measured at any of the ratios.

    Returns:
        A sentence for each.

    Raises:
        ValueError: `strict`, and nothing is measured at any of the ratios.
    """
    folders = {Path(_split(word)[0]).resolve() for word in words}
    told: dict[str, None] = {}
    for method in methods:
        place = method.artefact and method.artefact.resolve()
        others = ", ".join(f"{cr:g}" for cr in crs if cr != method.cr)
        if place not in folders or method.dial or method.cr is None or not others:
            continue
        if strict and not any(one.cr in crs for one in methods):
            raise ValueError(
                f"{method.artefact} has one ratio, {method.cr:g}, and nothing named takes --cr "
                f"{others}: leave --cr out, or name a policy or a dial with --against too"
            )
        name = name_of(place)
        told[f"{name} has one ratio and is measured at {method.cr:g} only, not at {others}."] = None
    return list(told)


def is_artefact(folder: str | Path) -> bool:
    """True when a retrofit's result is in the folder."""
    return (Path(folder) / CONFIG).is_file()


def codecs_of(names: Iterable[str]) -> tuple[str | None, ...]:
    """Checks names of codecs; `none` means the dtype of the model.

    Raises:
        ValueError: no such codec, with the closest match.

    >>> codecs_of(["none", "int4"])
    (None, 'int4')
    """
    unique = dict.fromkeys(names)
    for name in unique:
        if name != NO_CODEC:
            get_codec(name)
    return tuple(None if name == NO_CODEC else name for name in unique) or (None,)


def check_ratio(text: str) -> float:
    """Reads a compression ratio.

    Raises:
        ValueError: no number, or below 1.

    >>> check_ratio("2.5")
    2.5
    """
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 1 <= ratio < math.inf:
        raise ValueError(
            f"a ratio is tokens seen / entries kept, at least 1, such as 2; got {text!r}"
        )
    return ratio


def _split(word: str) -> tuple[str, str | None]:
    """Name and codec of `NAME+CODEC`; a folder may have a plus in its name."""
    name, plus, codec = word.rpartition("+")
    if not plus or is_artefact(word):
        return word, None
    if name == DENSE:
        raise ValueError(
            f"{word}: the dense model is the reference and has a cache of its own; {KEEP_ALL}+"
            f"{codec} keeps every entry in {codec}"
        )
    get_codec(codec)
    return name, codec


def _named(name: str, codec: str | None, naming: Naming) -> list[Method]:
    """All methods that one name stands for."""
    if name == DENSE:
        return []
    if is_artefact(name):
        return _of_folder(Path(name), codec, naming)
    known = [DENSE, *list_policies()]
    policy, marked, ratio = name.rpartition("-cr")
    if marked and policy in known and has_ratio(policy):
        return _named(policy, codec, replace(naming, crs=(check_ratio(ratio),)))
    if name not in known:
        there = [str(place) for folder in naming.folders for place, _ in artefacts(folder)]
        raise ValueError(
            f"unknown method {name!r}.{closest(name, [*known, *there])} Methods: "
            f"{', '.join(known)}, or the folder of an artefact (`cachefold ls artefacts`); "
            "each also as NAME+CODEC"
        )
    return [
        _of_policy(name, cr, codec, naming) for cr in (naming.crs if has_ratio(name) else (None,))
    ]


def _of_policy(name: str, cr: float | None, codec: str | None, naming: Naming) -> Method:
    folder = find_artefact(name, cr, naming.base, naming.folders) if is_learned(name) else None
    return Method(
        name=(name if cr is None else f"{name}-cr{cr:g}") + _plus(codec), policy=name, cr=cr,
        codec=codec, artefact=folder, dial=folder is not None and _range(folder) is not None,
    )  # fmt: skip


def _plus(codec: str | None) -> str:
    return "" if codec is None else f"+{codec}"


def _range(folder: Path) -> float | None:
    """Largest ratio of the dial of an artefact; None = it has none."""
    most: float | None = read_config(folder)["policy"].get("max_cr")
    return most


def _of_folder(folder: Path, codec: str | None, naming: Naming) -> list[Method]:
    """The method of an artefact, or of its dial at every ratio."""
    config = read_config(folder)
    base = str(config["base"].get("id"))
    if not same_base(base, naming.base):
        raise ValueError(
            f"{folder} belongs to the base model {base}, not to {naming.base}: only methods of "
            "one base can be compared"
        )
    name = name_of(folder.resolve())
    policy, most = config["policy"], _range(folder)
    one = Method(
        name=name + _plus(codec), policy=policy["name"], cr=policy.get("cr"), codec=codec,
        artefact=folder, dial=most is not None,
    )  # fmt: skip
    if most is None:
        return [one]
    beyond = [cr for cr in naming.crs if cr > most]
    if beyond:
        raise ValueError(f"the dial of {folder} serves cr from 1 to {most:g}; got {beyond[0]:g}")
    return [replace(one, name=f"{name}-cr{cr:g}{_plus(codec)}", cr=cr) for cr in naming.crs]
