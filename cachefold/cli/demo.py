"""`cachefold demo`: the shipped artefact on a real document, with numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefold.cli._artefact import SHIPPED
from cachefold.cli._places import find
from cachefold.writable import check_writable

if TYPE_CHECKING:
    from cachefold.cache.folded import FoldedCache
    from cachefold.cli._artefact import Loaded

NEW_TOKENS = 60


def run(
    artefact: Annotated[
        Path, typer.Option(help="Folder that a retrofit wrote, or its name.")
    ] = SHIPPED,
    out: Annotated[Path, typer.Option(help="Folder for summary.json.")] = Path("runs/demo"),
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the document to read.")] = 1600,
    data: Annotated[Path, typer.Option(help="Folder of held-out text.")] = Path("data/heldout"),
    document: Annotated[str, typer.Option(help="File in it to continue.")] = "textbook.jsonl.gz",
    pieces: Annotated[int, typer.Option(min=1, help="Pieces to measure per file.")] = 2,
    piece_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 1024,
    cr: Annotated[float | None, typer.Option(help="Ratio of an artefact with a dial.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Kind of text its dial was calibrated for: chat, code, bulk.")
    ] = None,
) -> None:
    """Continue a real document with a folded cache and measure what folding costs."""
    check_writable(out)
    data = find(data)
    files = sorted(data.glob("*.jsonl.gz")) + sorted(data.glob("*.jsonl"))
    if data / document not in files:
        names = ", ".join(file.name for file in files) or "no .jsonl or .jsonl.gz file"
        raise ValueError(f"--document {document} is not in --data {data}; there: {names}")
    from cachefold.cli._artefact import load, open_artefact

    opened = open_artefact(artefact, cr=cr, preset=preset)
    print(f"loading {artefact}", flush=True)
    loaded = load(opened)
    cache = _continue(loaded, data / document, tokens)
    summary = {**_facts(loaded, cache), **_losses(loaded, files, pieces, piece_tokens)}
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "summary.json.part"
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out / "summary.json")
    print(f"summary written to {out / 'summary.json'}")


def _continue(loaded: Loaded, document: Path, tokens: int) -> FoldedCache:
    """Reads the document, prints its continuation and the map of the cache."""
    import torch
    from transformers import TextStreamer

    from cachefold.cli._artefact import cache_line, greedy_or_sample
    from cachefold.models.fold import new_cache
    from cachefold.text import load_blocks
    from cachefold.viz import compression_map_blocks

    blocks = load_blocks([document], loaded.tokenizer, tokens)
    ids = blocks[len(blocks) // 2][None].to(loaded.model.device)
    print(f"{document.name}: {tokens:,} tokens from its middle, continued:\n", flush=True)
    cache = new_cache(loaded.model)
    loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=loaded.tokenizer.eos_token_id or 0, **greedy_or_sample(loaded.model, 0.0),
    )  # fmt: skip
    print(f"\n{compression_map_blocks(cache)}\n{cache_line(cache)}\n", flush=True)
    return cache


def _facts(loaded: Loaded, cache: FoldedCache) -> dict[str, Any]:
    """Facts on the cache; tokens and entries are sums over folded layers and heads."""
    entries = cache.entries()
    return {
        "model": loaded.config["base"]["id"],
        "target_cr": loaded.model.config.cachefold.get("cr"),
        "cr": cache.compression_ratio(),
        "tokens_seen": cache.get_seq_length() * sum(entry.numel() for entry in entries),
        "entries_kept": sum(int(entry.sum()) for entry in entries),
        "dense_cache_bytes": cache.dense_nbytes(),
        "folded_cache_bytes": cache.nbytes(),
    }


def _losses(loaded: Loaded, files: list[Path], pieces: int, tokens: int) -> dict[str, Any]:
    """Held-out loss, dense against folded; a line per file, then the mean over pieces."""
    from cachefold.cli._artefact import load_base_of
    from cachefold.evaluation.perplexity import heldout_loss

    base = None if loaded.config["lora_rank"] else load_base_of(loaded)
    asked = loaded.model.config.cachefold.get("cr")  # None = a budget of entries
    at = "" if asked is None else f", cr {asked:g} asked for"
    print(f"held-out loss in nats/token, {tokens:,}-token pieces{at}:", flush=True)
    results = []
    for file in files:
        [result] = heldout_loss(
            loaded.model, loaded.tokenizer, [file], pieces=pieces, tokens=tokens, base=base
        )
        _line(result.name, result.dense_loss, result.folded_loss, f"  cr {result.cr:.2f}")
        results.append(result)
    count = sum(result.pieces for result in results)
    dense = sum(result.dense_loss * result.pieces for result in results) / count
    folded = sum(result.folded_loss * result.pieces for result in results) / count
    _line("mean", dense, folded)
    return {
        "dense_loss": dense,
        "folded_loss": folded,
        "files": [
            {
                "name": r.name, "pieces": r.pieces, "cr": r.cr, "dense_loss": r.dense_loss,
                "folded_loss": r.folded_loss,
            }
            for r in results
        ],
    }  # fmt: skip


def _line(name: str, dense: float, folded: float, rest: str = "") -> None:
    change = folded - dense
    print(f"  {name:<12} dense {dense:.3f}  folded {folded:.3f} ({change:+.3f}){rest}", flush=True)
