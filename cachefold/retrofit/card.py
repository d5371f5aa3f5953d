"""The model card of an artefact: what it is, how it was made and what was measured."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from cachefold.bases import BASES
from cachefold.models.hub import artefact_digest, read_config
from cachefold.retrofit.checkpoint import RECIPE
from cachefold.retrofit.reporting import read_log
from cachefold.viz import compression_map_blocks, load_map

CARD = "README.md"
CURVE = "retrofit.png"
HELDOUT = "heldout.json"
"""Tables of `cachefold reproduce`."""
TOKENS = 1024
"""Of a piece, where `cachefold reproduce` is told nothing else."""


def card(folder: Path, name: str) -> str:
    """Markdown of the model card of an artefact, from the files beside it.

    Args:
        folder: of the artefact, as commands are to name it; `heldout.json` (of `cachefold
            reproduce`) and `retrofit.png` are shown where they are there.
        name: of the artefact.

    Raises:
        ValueError: no artefact in the folder, or its recipe, log or map is missing or broken.
    """
    config = read_config(folder)
    recipe = _read(folder / RECIPE, yaml.safe_load)
    log = read_log(folder)
    shipped = _shipped(folder)
    place = folder if shipped is None else Path("artefacts") / shipped
    parts = [
        _head(name, config),
        _facts(config, recipe, log) + f"\n| command | {_command(place, shipped)} |",
        _use(place, config),
        _tables(tables_of(folder)[0], shipped),
        f"## Training\n\n![each step of the training, and the ratio of each head]({CURVE})"
        if (folder / CURVE).is_file()
        else "",
        "## Compression map\n\n"
        f"Ratio of every head, {recipe['data']['seq_len']} held-out tokens:\n\n```\n"
        f"{compression_map_blocks(load_map(folder), ascii_only=False)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def hours(log: list[dict[str, Any]], tokens: int) -> float:
    """How long a run took, by the speed in its log.

    Args:
        log: its lines.
        tokens: of the whole run.

    >>> log = [{"step": 5, "tokens_per_second": 100.0}, {"step": 10, "tokens_per_second": 50.0}]
    >>> hours(log, 36000 * 10)
    1.5
    """
    per_step, before, seconds = tokens / log[-1]["step"], 0, 0.0
    for row in log:
        seconds += (row["step"] - before) * per_step / row["tokens_per_second"]
        before = row["step"]
    return seconds / 3600


def _shipped(folder: Path) -> str | None:
    """Name by which `cachefold reproduce --shipped` finds an artefact; None = by none."""
    path = folder.resolve()
    repository = path.parents[1] if path.parent.name == "artefacts" else None
    if repository is None or not (repository / "recipes" / f"{path.name}.yaml").is_file():
        return None
    return path.name


def _head(name: str, config: dict[str, Any]) -> str:
    base = config["base"]["id"]
    hub = BASES[base].hub_id if base in BASES else base
    policy = config["policy"]
    most = policy.get("max_cr")
    ratio = (
        f"any ratio from 1 to {most:g}" if most
        else f"a ratio of {policy.get('cr') or config['cr']:g}"
    )  # fmt: skip
    return (
        f"---\nlibrary_name: cachefold\nbase_model: {hub}\ntags: [kv-cache, {policy['name']}]\n"
        f"---\n\n# {name}\n\n{_contents(config)} that compress the KV cache of {hub} "
        f"({_weights(config['base'])}) with `{policy['name']}`, for {ratio}."
    )


def _weights(base: dict[str, str]) -> str:
    """Which weights of the base model it was trained on."""
    known = BASES.get(base["id"])
    if known is None or not base["revision"].startswith(f"{known.distribution}=="):
        return base["revision"]
    return f"{base['revision']}: {known.gguf}, unpacked to bfloat16"


def _contents(config: dict[str, Any]) -> str:
    if config["lora_rank"]:
        return "Adapters and decisions, without weights of the base model,"
    return "All weights, retrained, and decisions"


def _facts(config: dict[str, Any], recipe: dict[str, Any], log: list[dict[str, Any]]) -> str:
    train, data = recipe["train"], recipe["data"]
    trained = f"LoRA rank {config['lora_rank']}" if config["lora_rank"] else "all weights"
    source = ", ".join(data["files"]) or data["dataset"]
    if data.get("recall"):  # not in recipes of older runs
        source += f", and of all text {data['recall']:.0%} made of it, in which facts come again"
    spared = ", ".join(f"{layer}/{head}" for layer, head in train.get("spare", []))
    trained += f", from {recipe.get('init') or 'the original model'}"
    facts = {
        "policy": ", ".join(f"{key}={value}" for key, value in config["policy"].items()),
        "ratio reached": f"{config['cr']:.2f}, on {recipe['data']['held_out']} sequences of the "
        f"training mix that were held out{_asked(config['policy'])}",
        "trained": trained + (f"; heads spared (layer/kv head): {spared}" if spared else ""),
        "tokens": f"{config['tokens']:,} in sequences of {config['seq_len']}, seed {train['seed']}",
        "time": f"{hours(log, config['tokens']):.1f} hours",
        "data": source,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items())])


def _asked(policy: dict[str, Any]) -> str:
    return f", where {policy['cr']:g} was asked for" if policy.get("cr") else ""


def _command(place: Path, shipped: str | None) -> str:
    command = f"cachefold retrofit {shlex.quote((place / RECIPE).as_posix())}"
    if shipped is not None:
        return f"`{command}`, from a clone of the repository"
    return f"`{command} output_dir=ANOTHER`, from the folder that its paths start in"


def _use(place: Path, config: dict[str, Any]) -> str:
    more = ", cr=4" if config["policy"].get("max_cr") else ""
    return (
        "## Use\n\n```python\nimport cachefold\nfrom cachefold.zoo import load_base\n\n"
        f'model, tokenizer = load_base("{config["base"]["id"]}")\n'
        f'cachefold.load_folded("{place.as_posix()}", model{more})  # this folder\n```'
    )


def tables_of(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Held-out tables beside an artefact that were made of it.

    One that doesn't say what it was made of belongs to what it lies beside.

    Args:
        folder: of the artefact.

    Returns:
        The tables, and how many others there are, of other weights or another calibration.

    Raises:
        ValueError: no artefact, or a file of tables that can't be read.
    """
    if not (folder / HELDOUT).is_file():
        return [], 0
    found = _read(folder / HELDOUT, json.loads)
    own = artefact_digest(folder)
    mine = [table for table in found if table.get("artefact", own) == own]
    return mine, len(found) - len(mine)


def _tables(tables: list[dict[str, Any]], shipped: str | None) -> str:
    """Those of one size together."""
    if not tables:
        return ""
    tables = sorted(tables, key=_setting)
    groups = [list(group) for _, group in itertools.groupby(tables, key=_setting)]
    return "\n\n".join(["## Measured", *(_table(group, shipped) for group in groups)])


def _setting(table: dict[str, Any]) -> tuple[int, int, str]:
    return table["tokens"], table["pieces"], table["dtype"]


def _table(tables: list[dict[str, Any]], shipped: str | None) -> str:
    """Those of one size, ratio by ratio, and how they were made."""
    lines = [
        "| cr asked | file | dense | folded | increase (se) | cr |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for table in tables:
        asked = f"{table['cr']:g}"
        lines += [
            f"| {asked} | {row['name']} | {row['dense_loss']:.4f} | {row['folded_loss']:.4f} | "
            f"{row['increase']:+.4f} ({row['increase_error']:.4f}) | {row['cr']:.2f} |"
            for row in table["files"]
        ]
        lines.append(f"| {asked} | **mean** | | | **{table['mean_increase']:+.4f}** | |")
    tokens, pieces, dtype = _setting(tables[0])
    made = (
        f"Loss in nats/token on held-out text, at most {pieces} pieces of {tokens} tokens of each "
        f"file, {dtype}, one training seed; standard error over pieces."
    )
    if shipped is not None:
        ratios = ",".join(f"{table['cr']:g}" for table in tables)
        size = f"--pieces {pieces}" + ("" if tokens == TOKENS else f" --tokens {tokens}")
        made += f" Made by `cachefold reproduce {shipped} --shipped --cr {ratios} {size}`."
    return "\n".join([*lines, "", made])


def _read(path: Path, parse: Any) -> Any:
    """What is in a file that an artefact must have.

    Raises:
        ValueError: it is missing or can't be read.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"a card needs {path}, which a retrofit writes beside its artefact (RUN/final)"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
