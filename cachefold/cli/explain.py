"""`cachefold explain`: what one head decides, token by token."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.cli._artefact import SHIPPED

if TYPE_CHECKING:
    from cachefold.cli._artefact import Artefact, Loaded
    from cachefold.core.decisions import Decisions

MERGING = (
    "#", "token", "alpha", "omega", "decision", "carried out", "closed", "open", "ring", "kept"
)  # fmt: skip
"""Columns where a token merges into an entry."""
DROPPING = ("#", "token", "alpha", "decision", "carried out", "settled", "ring", "kept")
"""Columns where it takes the place of the one before it: nothing is weighed."""
CARRIED_OUT = (
    "carried out: the token after which it happens, as the newest tokens wait in the ring."
)
MERGING_LEGEND = (
    "alpha: the head's wish to merge, granted above 0.5; the first token has nothing to merge "
    f"into. {CARRIED_OUT} closed, open, ring, kept: entries once the token of the line was read."
)
DROPPING_LEGEND = (
    "alpha: the head's wish to drop the token before, granted above 0.5; the first token has none "
    f"before it. {CARRIED_OUT} settled, ring, kept: entries once the token of the line was read; "
    "the newest settled one may still be dropped."
)


def run(
    text: Annotated[str, typer.Argument(help="Text to look at.")],
    layer: Annotated[int, typer.Option(help="Layer, from 0.")] = 0,
    head: Annotated[int, typer.Option(help="Key-value head, from 0.")] = 0,
    artefact: Annotated[
        Path, typer.Option(help="Folder that a retrofit wrote, or its name.")
    ] = SHIPPED,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    cr: Annotated[float | None, typer.Option(help="Ratio of an artefact with a dial.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Kind of text its dial was calibrated for: chat, code, bulk.")
    ] = None,
) -> None:
    """Show what one head decides for every token of a text."""
    if not text.strip():
        raise ValueError("the text is empty")
    from cachefold.cli._artefact import load, open_artefact

    opened = open_artefact(artefact, dtype, cr, preset)
    _check_decides(opened)
    _check_place(opened, layer, head)
    _show(load(opened), opened.policy, text, (layer, head))


def _show(loaded: Loaded, policy: Any, text: str, place: tuple[int, int]) -> None:
    """Reads the text and prints the table of one layer and head."""
    import torch

    from cachefold.models.run import FoldRun

    ids = loaded.tokenizer(text, return_tensors="pt").input_ids.to(loaded.model.device)
    decisions: dict[int, Decisions] = {}
    with torch.no_grad():
        loaded.model(ids, use_cache=False, logits_to_keep=1, fold_run=FoldRun(recorder=decisions))
    tokens = [loaded.tokenizer.decode([i]) for i in ids[0].tolist()]
    drops = policy.window == 1  # an entry of one token can't take another in
    header = DROPPING if drops else MERGING
    layer, head = place
    rows = explain_rows(tokens, decisions[layer], head, policy.delay, drops=drops)
    print_table(header, [tuple(row[name] for name in header) for row in rows])
    print()
    print(textwrap.fill(DROPPING_LEGEND if drops else MERGING_LEGEND, 88))


def _check_decides(artefact: Artefact) -> None:
    """Refuses a policy without decisions of its tokens: there is nothing to show."""
    policy: Any = artefact.policy
    if policy.decision == "none":
        raise ValueError(
            f"{artefact.folder} has policy {policy.name}, which decides nothing about a token; "
            "explain shows decisions of merging (dmc, dmc-c) and dropping (dms). `cachefold ls "
            "artefacts` shows which there are"
        )


def _check_place(artefact: Artefact, layer: int, head: int) -> None:
    """Refuses a layer or head that decides nothing, by the shape of the base model alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from cachefold.models.families import attention_layers, is_full_attention
    from cachefold.zoo import base_config

    shape = base_config(artefact.base)  # not on the meta device: it may have to convert weights
    with torch.device("meta"):
        attentions = attention_layers(AutoModelForCausalLM.from_config(shape))
    layers = [index for index, one in enumerate(attentions) if is_full_attention(one)]
    if layer not in layers:
        raise ValueError(f"--layer {layer} does not fold; folded layers: {_span(layers)}")
    policy: Any = artefact.policy
    heads = policy.kv_heads or attentions[layer].config.num_key_value_heads
    if not 0 <= head < heads:
        raise ValueError(f"--head must be 0..{heads - 1}, got {head}")


def explain_rows(
    tokens: list[str], decisions: Decisions, head: int, delay: int, *, drops: bool
) -> Iterator[dict[str, str]]:
    """Yields one line per token of a single text.

    Args:
        tokens: T texts.
        decisions: of one layer, (1, K, T), as used: the first token can't merge.
        head: which of the K heads.
        delay: tokens between a decision and its execution.
        drops: whether a token that merges takes the place of the one before it.

    Yields:
        Cells by column, for `MERGING` and `DROPPING`.
    """
    import torch

    merge = (decisions.alpha[0, head] > 0.5).tolist()
    wish = torch.sigmoid(decisions.logits[0, head].float()).tolist()
    omega = decisions.omega[0, head].tolist()
    appended = 0
    for i, token in enumerate(tokens):
        executed = i - delay
        if executed >= 0 and not merge[executed]:
            appended += 1
        has_open = int(executed >= 0)
        ring = min(i + 1, delay)
        when = f"after #{i + delay}" if i + delay < len(tokens) else "not yet"
        granted = f"drop #{i - 1}" if drops else "merge"
        yield {
            "#": str(i), "token": repr(token)[1:-1], "alpha": f"{wish[i]:.3f}",
            "omega": f"{omega[i]:.3f}", "decision": granted if merge[i] else "append",
            "carried out": when, "closed": str(appended - has_open), "open": str(has_open),
            "settled": str(appended), "ring": str(ring), "kept": str(appended + ring),
        }  # fmt: skip


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints aligned columns; the texts are cut at 24 characters."""
    cut = [header, *(tuple(cell[:24] for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cut) for i in range(len(header))]
    for row in cut:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _span(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers))
