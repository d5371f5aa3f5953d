"""Loss on held-out text, by context length and dense against folded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachefold.evaluation.reading import Reading
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate, check_limit, data_file
from cachefold.models.fold import FoldRun, check_unmerged, is_folded
from cachefold.models.lora import adapters_disabled
from cachefold.text import Row, load_blocks, read_file, stem

FILES = ("chat", "code", "moby_dick", "textbook", "wikipedia", "wikitext2")
"""Of the data folder's heldout."""

# How many pieces there are depends on the tokenizer, and rows are known before it; SmolLM2 has
# 3.4 to 4.5 characters in a token.
_MOST_CHARACTERS = 6
_BLOCK = 16
_FIRST_BIN = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """Loss on pieces of held-out text, one text per row, all files in turn.

    Plain pieces follow one another and every token but the first counts, also by how much
    context it had: `loss_to_256` is that of tokens with 128 to 255 tokens before them. Sliding
    windows overlap by half and only their second half counts, so that every token has at least
    half a window of context.

    Raises:
        ValueError: a length that can't be halved.

    >>> Perplexity(tokens=2048, sliding=True).name
    'perplexity-sliding-2048'
    """

    tokens: int = 1024
    """Of a piece, or of a window; even."""
    sliding: bool = False
    """Whether windows overlap."""
    metric: str = "loss"
    """nats/token."""
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        """Checks the length."""
        if self.tokens < 4 or self.tokens % 2:
            raise ValueError(f"tokens must be even and >= 4, got {self.tokens}")

    @property
    def name(self) -> str:
        """`perplexity-1024`, or `perplexity-sliding-1024`."""
        return f"perplexity-{'sliding-' if self.sliding else ''}{self.tokens}"

    @property
    def _step(self) -> int:
        """Tokens from the start of a row to that of the next."""
        return self.tokens // 2 if self.sliding else self.tokens

    def rows(self, limit: int | None) -> list[dict[str, Any]]:
        """Rows say `file` and `piece`; the first pieces of all files come first."""
        check_limit(limit)
        found = []
        for index, name in enumerate(FILES):
            characters = sum(map(_characters, read_file(data_file(f"heldout/{name}.jsonl.gz"))))
            pieces = characters // (_MOST_CHARACTERS * self._step) - self.sliding
            found += [(piece, index, name) for piece in range(pieces)]
        return [
            {"id": f"{name}/{piece}", "file": name, "piece": piece}
            for piece, _, name in sorted(found)[:limit]
        ]

    def evaluate(
        self, rows: Sequence[dict[str, Any]], subject: Subject
    ) -> Iterator[dict[str, Any]]:
        """Scores rows."""
        texts = {
            name: load_blocks(
                [data_file(f"heldout/{name}.jsonl.gz")],
                subject.tokenizer,
                self.tokens,
                stride=self._step if self.sliding else None,
            )  # fmt: skip
            for name in sorted({row["file"] for row in rows})
        }
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            pieces = [self._piece(texts[row["file"]], row) for row in block]
            for row, nats in zip(block, subject.losses(pieces), strict=True):
                yield {"id": row["id"]} | self._means(nats.double())

    def _piece(self, blocks: Tensor, row: dict[str, Any]) -> Tensor:
        """The tokens of a row, (tokens,)."""
        if row["piece"] >= len(blocks):
            raise ValueError(
                f"{row['file']} has no piece {row['piece']} of {self.tokens} tokens with this "
                f"tokenizer, which makes more than {_MOST_CHARACTERS} characters a token"
            )
        return blocks[row["piece"]]

    def _means(self, nats: Tensor) -> dict[str, float]:
        """From the loss of tokens 1 to `tokens` - 1, (tokens - 1,)."""
        if self.sliding:
            return {"loss": nats[self._step - 1 :].mean().item()}
        means = {"loss": nats.mean().item()}
        first, end = 0, _FIRST_BIN
        while first < self.tokens:
            # Entry i is the loss of token i + 1, which has i + 1 tokens before it.
            means[f"loss_to_{min(end, self.tokens)}"] = (
                nats[max(first - 1, 0) : end - 1].mean().item()
            )
            first, end = end, 2 * end
        return means

    def summarise(self, results: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
        """Means over rows, and the perplexity with its error by the delta method."""
        names = [name for name in results[0] if name != "id"]
        found = {name: Estimate.of([row[name] for row in results]) for name in names}
        return {"loss": found["loss"], "perplexity": found["loss"].exp()} | found


def _characters(row: Row) -> int:
    fields = row[1]
    if "messages" in fields:
        return sum(len(message["content"]) for message in fields["messages"])
    return len(fields["text"])


TASKS = tuple(
    Perplexity(tokens=tokens, sliding=sliding)
    for sliding in (False, True)
    for tokens in (512, 1024, 2048, 4096, 8192)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """Dense against folded on the same pieces of one file."""

    name: str
    """File name without endings."""
    pieces: int
    """Number of pieces."""
    tokens: int
    """Tokens of each piece."""
    dense_loss: float
    """nats/token of the original model."""
    folded_loss: float
    """nats/token of the folded model."""
    cr: float
    """Tokens / entries kept at the end of each piece, folded layers and heads, ring included."""
    bytes_ratio: float
    """Bytes of the cache / of a dense one at the end of each piece, sliding layers included."""
    increase_error: float
    """Standard error of `increase` over the pieces, nats/token; nan for a single piece."""

    @property
    def increase(self) -> float:
        """nats/token that folding costs, adapters included."""
        return self.folded_loss - self.dense_loss


class _Unfolded(Subject):
    """The original model inside a folded one."""

    def _reading(self) -> Reading:
        cache = DynamicCache(config=self.model.config)
        return Reading(self.model, cache, {"fold_run": FoldRun(mode="dense")})


def heldout_loss(
    model: PreTrainedModel,
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    pieces: int = 6,
    tokens: int = 1024,
    base: PreTrainedModel | None = None,
) -> list[HeldOutLoss]:
    """Measures the loss increase of a folded model over its own base.

    Args:
        model: a folded model.
        tokenizer: of the model.
        files: local .jsonl/.txt (.gz), each measured on its own.
        pieces: most pieces of each file, from its beginning on.
        tokens: tokens of a piece.
        base: the original model, needed when all weights were trained; None = the folded model
            itself with its adapters off, which is the original when only they were trained.

    Returns:
        One result per file.

    Raises:
        ValueError: the model is not folded, its adapters are merged so that it has no dense self,
            or a file gives not one piece.
    """
    if not is_folded(model):
        raise ValueError("the model is not folded; load an artefact or call fold(model, policy)")
    if base is None:
        check_unmerged(model, "compared with its dense self")
    return [_measure_file(model, base, tokenizer, Path(file), pieces, tokens) for file in files]


def _measure_file(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    tokenizer: Any,
    file: Path,
    pieces: int,
    tokens: int,
) -> HeldOutLoss:
    texts = load_blocks([file], tokenizer, tokens)[:pieces]
    options: dict[str, Any] = {"batch_size": 1, "max_length": tokens}
    subject = Subject(model, tokenizer, **options)
    folded = _piece_losses(subject, texts)
    if base is not None:
        dense = _piece_losses(Subject(base, tokenizer, **options), texts)
    else:
        with adapters_disabled(model):
            dense = _piece_losses(_Unfolded(model, tokenizer, **options), texts)
    return HeldOutLoss(
        name=stem(file), pieces=len(texts), tokens=tokens,
        dense_loss=dense.mean().item(), folded_loss=folded.mean().item(),
        cr=subject.footprint.cr, bytes_ratio=subject.footprint.bytes_ratio,
        increase_error=(folded - dense).std().item() / len(texts) ** 0.5
        if len(texts) > 1 else math.nan,
    )  # fmt: skip


def _piece_losses(subject: Subject, texts: Tensor) -> Tensor:
    """Mean nats/token of each of (M, T) texts, (M,) float64."""
    return torch.stack([nats.double().mean() for nats in subject.losses(list(texts))])
