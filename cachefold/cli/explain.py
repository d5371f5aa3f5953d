"""`cachefold explain`: what one head decides, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefold.cli._artefact import SHIPPED

if TYPE_CHECKING:
    from cachefold.core.decisions import Decisions

HEADER = (
    "#", "token", "alpha", "omega", "decision", "carried out", "closed", "open", "ring", "kept"
)  # fmt: skip


def run(
    text: Annotated[str, typer.Argument(help="Text to look at.")],
    layer: Annotated[int, typer.Option(help="Layer, from 0.")] = 0,
    head: Annotated[int, typer.Option(help="Key-value head, from 0.")] = 0,
    artefact: Annotated[Path, typer.Option(help="Folder that a retrofit wrote.")] = SHIPPED,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    cr: Annotated[float | None, typer.Option(help="Ratio of an artefact with a dial.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Kind of text its dial was calibrated for: chat, code, bulk.")
    ] = None,
) -> None:
    """Show what one head decides for every token of a text."""
    from cachefold.cli._artefact import load_artefact

    loaded = load_artefact(artefact, dtype, cr, preset)
    import torch

    from cachefold.models.fold import FoldRun, folded_layers

    config, layers = loaded.model.config, folded_layers(loaded.model)
    if layer not in layers:
        raise ValueError(f"--layer {layer} does not fold; folded layers: {_span(layers)}")
    if not 0 <= head < config.num_key_value_heads:
        raise ValueError(f"--head must be 0..{config.num_key_value_heads - 1}, got {head}")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids.to(loaded.model.device)
    if ids.numel() == 0:
        raise ValueError("the text is empty")
    decisions: dict[int, Decisions] = {}
    with torch.no_grad():
        loaded.model(ids, use_cache=False, logits_to_keep=1, fold_run=FoldRun(recorder=decisions))
    tokens = [loaded.tokenizer.decode([i]) for i in ids[0].tolist()]
    rows = list(explain_rows(tokens, decisions[layer], head, loaded.config["policy"]["delay"]))
    print_table(HEADER, rows)
    print(
        "\nalpha: the head's wish to merge, granted above 0.5; the first token has "
        "nothing to\nmerge into. carried out: the token after which it happens, as the newest "
        "tokens wait in the\nring. closed, open, ring, kept: entries once the token of the line "
        "was read."
    )


def explain_rows(
    tokens: list[str], decisions: Decisions, head: int, delay: int
) -> Iterator[tuple[str, ...]]:
    """Yields one line per token of a single text.

    Args:
        tokens: T texts.
        decisions: of one layer, (1, K, T), as used: the first token can't merge.
        head: which of the K heads.
        delay: tokens between a decision and its execution.

    Yields:
        Cells, as `HEADER` names them.
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
        yield (
            str(i), repr(token)[1:-1], f"{wish[i]:.3f}", f"{omega[i]:.3f}",
            "merge" if merge[i] else "append", when, str(appended - has_open), str(has_open),
            str(ring), str(appended + ring),
        )  # fmt: skip


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
