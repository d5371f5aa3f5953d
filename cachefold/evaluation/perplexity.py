"""Loss on held-out text through the parallel form with hard decisions, so folding is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from cachefold.core.accounting import compression_ratio, count_entries
from cachefold.core.decisions import Decisions
from cachefold.models.fold import FoldRun, is_folded
from cachefold.models.lora import adapters_disabled
from cachefold.text import load_blocks

_CHUNK = 128


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
    """Tokens / entries kept at the end of each piece, all layers and heads, ring included."""
    increase_error: float
    """Standard error of `increase` over the pieces, nats/token; nan for a single piece."""

    @property
    def increase(self) -> float:
        """nats/token that folding costs, adapters included."""
        return self.folded_loss - self.dense_loss


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
        ValueError: the model is not folded, or a file gives not one piece.
    """
    if not is_folded(model):
        raise ValueError("the model is not folded; load an artefact or call fold(model, policy)")
    return [_measure_file(model, base, tokenizer, Path(file), pieces, tokens) for file in files]


@torch.no_grad()
def _measure_file(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    tokenizer: Any,
    file: Path,
    pieces: int,
    tokens: int,
) -> HeldOutLoss:
    blocks = load_blocks([file], tokenizer, tokens)[:pieces]
    pieces = len(blocks)
    dense, folded = torch.zeros(2, pieces, dtype=torch.float64)
    seen, kept = 0, 0
    for i, piece in enumerate(blocks[:, None]):
        dense[i] = _dense_loss(model, base, piece)
        decisions: dict[int, Decisions] = {}
        folded[i] = _loss(model, piece, FoldRun(recorder=decisions))
        assert decisions, "no layer decided: folding was not seen"
        alphas = (decision.alpha for decision in decisions.values())
        valid = torch.ones_like(piece, dtype=torch.bool)
        more_seen, more_kept = count_entries(alphas, valid, model.config.cachefold["delay"])
        seen, kept = seen + more_seen, kept + more_kept
    return HeldOutLoss(
        name=file.name.split(".")[0], pieces=pieces, tokens=tokens,
        dense_loss=dense.mean().item(), folded_loss=folded.mean().item(),
        cr=compression_ratio(seen, kept),
        increase_error=(folded - dense).std().item() / pieces**0.5
        if pieces > 1 else math.nan,
    )  # fmt: skip


def _dense_loss(model: PreTrainedModel, base: PreTrainedModel | None, ids: Tensor) -> float:
    if base is not None:
        return _loss(base, ids)
    with adapters_disabled(model):
        return _loss(model, ids, FoldRun(mode="dense"))


def _loss(model: PreTrainedModel, ids: Tensor, run: FoldRun | None = None) -> float:
    """Mean nats/token of (1, T) ids, logits by chunks in float32."""
    ids = ids.to(next(model.parameters()).device)
    how: dict[str, Any] = {} if run is None else {"fold_run": run}
    output = model(
        input_ids=ids, logits_to_keep=1, output_hidden_states=True, use_cache=False, **how
    )
    hidden, head = output.hidden_states[-1][0, :-1], model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    total = 0.0
    for states, labels in zip(hidden.split(_CHUNK), ids[0, 1:].split(_CHUNK), strict=True):
        logits = head(states).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    return total / (ids.shape[1] - 1)
