"""The table of a retrofit: loss and ratio on held-out text, dense against folded, file by file."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cachefold.evaluation.perplexity import FILES, HeldOutLoss, heldout_loss
from cachefold.evaluation.task import data_file
from cachefold.models.dial import turn_dial
from cachefold.models.hub import load_folded, read_config
from cachefold.zoo import load_base

PRESETS = ("chat", "code")
"""Files that are read with the preset of their name, where a dial is calibrated for it."""


def measure_artefact(
    folder: Path,
    *,
    cr: float | None = None,
    pieces: int = 12,
    tokens: int = 1024,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures an artefact on the held-out files, on a GPU where there is one.

    Args:
        folder: of the artefact.
        cr: ratio of a dial; None = the artefact's own.
        pieces: most pieces of each file.
        tokens: of a piece.
        dtype: of the base model.
        progress: told the lines of a table.

    Returns:
        `files`, a row for each, `mean_increase` in nats/token over files, `least_cr` and
        `most_cr` of a file, and the settings.

    Raises:
        ValueError: no artefact, or a ratio that it does not serve.
    """
    config = read_config(folder)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_base(str(config["base"]["id"]), getattr(torch, dtype))
    load_folded(folder, model, cr=cr).to(device)
    # Adapters can be switched off; what trained all weights has no dense self any more.
    base = None
    if not config["lora_rank"]:
        base = load_base(str(config["base"]["id"]), model.dtype)[0].to(device)
    progress(HEADER)
    rows: list[HeldOutLoss] = []
    for name in FILES:
        if name in PRESETS and name in config.get("dial", {}):
            turn_dial(model, config["dial"], preset=name)
        rows += heldout_loss(
            model, tokenizer, [data_file(f"heldout/{name}.jsonl.gz")], pieces=pieces,
            tokens=tokens, base=base,
        )  # fmt: skip
        turn_dial(model, config.get("dial", {}))
        progress(line(rows[-1]))
    facts = _facts(rows)
    asked = cr or config["policy"].get("cr") or config.get("cr") or facts["most_cr"]
    facts |= {"cr": asked, "pieces": pieces, "tokens": tokens}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    progress(
        f"mean increase {facts['mean_increase']:+.4f} nats/token, cr {facts['least_cr']:.3f} to "
        f"{facts['most_cr']:.3f}, {dtype}, {machine}"
    )
    return facts | {"dtype": dtype, "machine": machine}


HEADER = f"{'file':<12} pieces  dense   folded  increase (se)      cr  bytes"


def line(row: HeldOutLoss) -> str:
    """A row of the table.

    >>> print(line(HeldOutLoss(name="chat", pieces=2, tokens=8, dense_loss=2.0, folded_loss=2.25,
    ...     cr=2.5, bytes_ratio=0.4, increase_error=0.01)))
    chat              2  2.0000  2.2500  +0.2500 (0.0100)  2.500  40.0%
    """
    return (
        f"{row.name:<12} {row.pieces:>6}  {row.dense_loss:.4f}  {row.folded_loss:.4f}  "
        f"{row.increase:+.4f} ({row.increase_error:.4f})  {row.cr:.3f}  "
        f"{row.bytes_ratio:.1%}"
    )


def _facts(rows: Sequence[HeldOutLoss]) -> dict[str, Any]:
    ratios = [row.cr for row in rows]
    return {
        "mean_increase": sum(row.increase for row in rows) / len(rows),
        "least_cr": min(ratios), "most_cr": max(ratios),
        "files": [asdict(row) | {"increase": row.increase} for row in rows],
    }  # fmt: skip
