"""What one method costs and gains on held-out text: loss, bytes of the cache, decoding speed.

Legend: M pieces, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachefold.cache.folded import FoldedCache, kept_bytes
from cachefold.evaluation.subject import Subject
from cachefold.models.fold import is_folded, new_cache
from cachefold.text import load_blocks, stem

CONTEXTS = 4
"""Texts whose cache is measured, spread over the held-out files."""
STEPS, ROUNDS = 8, 5
"""Tokens that are decoded between two looks at the clock, and how often."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Held-out text as token ids."""

    pieces: dict[str, Tensor]
    """By name of the file: (M, T) pieces whose loss counts."""
    contexts: Tensor
    """(n, context) ids to fill caches with, n at most `CONTEXTS`."""


def names_of(files: Sequence[Path]) -> list[str]:
    """Names of held-out files in reports, in their order.

    Raises:
        ValueError: two files of one name, or none at all.

    >>> names_of([Path("law.v1.jsonl"), Path("chat.jsonl.gz")])
    ['law.v1', 'chat']
    """
    if not files:
        raise ValueError("no held-out text: the folder has no .jsonl, .txt or .gz file of these")
    named: dict[str, Path] = {}
    for file in files:
        name = stem(file)
        if name in named:
            raise ValueError(
                f"held-out files {named[name]} and {file} would both be called {name}: rename one "
                "of them, or move it to another folder"
            )
        named[name] = file
    return list(named)


def load_texts(
    files: Sequence[Path], tokenizer: Any, *, pieces: int, tokens: int, context: int
) -> Texts:
    """Reads the held-out files.

    Args:
        files: local .jsonl/.txt (.gz).
        tokenizer: of the model.
        pieces: most pieces of each file, from its beginning on.
        tokens: of a piece.
        context: tokens of a cache to measure; taken from all files, one after the other.

    Raises:
        ValueError: no file, two of one name, or not enough text in one.
    """
    names = names_of(files)
    blocks = load_blocks(files, tokenizer, context)
    every = max(1, len(blocks) // CONTEXTS)
    pieces_of = (load_blocks([file], tokenizer, tokens)[:pieces] for file in files)
    return Texts(dict(zip(names, pieces_of, strict=True)), blocks[::every][:CONTEXTS])


def heldout(subject: Subject, pieces: Tensor) -> dict[str, Any]:
    """Loss of every piece of one file, and the ratio reached on them.

    Args:
        subject: nothing ran on it before.
        pieces: (M, T) ids.
    """
    losses = subject.losses(list(pieces))
    return {
        "losses": [loss.double().mean().item() for loss in losses],
        "tokens": subject.footprint.tokens,
        "entries": subject.footprint.entries,
    }


@torch.no_grad()
def at_context(model: PreTrainedModel, contexts: Tensor, codec: str | None) -> dict[str, Any]:
    """Fills caches with held-out text, one request each, and decodes from the first.

    Args:
        model: dense, or folded.
        contexts: (n, T) ids.
        codec: how a folded cache stores its entries.

    Returns:
        Means over texts: `cache_bytes` (all that is allocated), `kept_bytes`, the
        `dense_cache_bytes` of as many tokens and `cr_at_context`; and `tokens_per_s`, the median
        over `ROUNDS`.
    """
    found: list[dict[str, float]] = []
    rates: list[float] = []
    for ids in contexts.to(model.device).split(1):  # type: ignore[no-untyped-call]
        cache = _new_cache(model, codec)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        found.append(_bytes(cache))
        if not rates:
            rates = _decode(model, cache, logits[:, -1].argmax(-1, keepdim=True))
    means = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    return means | {
        "context": contexts.shape[1], "texts": len(contexts),
        "tokens_per_s": statistics.median(rates), "rates": rates,
    }  # fmt: skip


def _new_cache(model: PreTrainedModel, codec: str | None) -> Any:
    return new_cache(model, codec=codec) if is_folded(model) else DynamicCache(config=model.config)


def _bytes(cache: Any) -> dict[str, float]:
    if isinstance(cache, FoldedCache):
        return {
            "cache_bytes": cache.allocated_nbytes(), "kept_bytes": cache.nbytes(),
            "dense_cache_bytes": cache.dense_nbytes(), "cr_at_context": cache.compression_ratio(),
        }  # fmt: skip
    held = sum(map(kept_bytes, cache.layers))
    return {
        "cache_bytes": held, "kept_bytes": held, "dense_cache_bytes": held, "cr_at_context": 1.0,
    }  # fmt: skip


def _decode(model: Any, cache: Any, ids: Tensor) -> list[float]:
    """Greedy steps; tokens/s of every round after one to warm up."""
    rates = []
    for _ in range(ROUNDS + 1):
        start = _now()
        for _ in range(STEPS):
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        rates.append(STEPS / (_now() - start))
    return rates[1:]


def _now() -> float:
    """Seconds, once the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
