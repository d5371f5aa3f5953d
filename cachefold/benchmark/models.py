"""The models of a benchmark: folded and dense over the same weights, in every dtype asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachefold.benchmark import imposed
from cachefold.benchmark.config import DELAY, BenchConfig
from cachefold.benchmark.machine import device
from cachefold.benchmark.parity import check_logits
from cachefold.benchmark.synthetic import Shape
from cachefold.models.fold import fold, merge_weights, new_cache
from cachefold.policies import DMC
from cachefold.zoo import load_base

CHECKED = (48, 4)
"""Tokens of the prefill and the steps after it whose logits are compared."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A folded and a dense model over the same weights."""

    dtype: str
    folded: Any
    dense: Any
    shape: Shape

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weights that a decode step reads: all but the rows of the embedding."""
        tied = self.dense.get_input_embeddings().weight is self.dense.lm_head.weight
        total = sum(p.numel() * p.element_size() for p in self.dense.parameters())
        table = self.dense.get_input_embeddings().weight
        return total - (0 if tied else table.numel() * table.element_size())


def load_pairs(config: BenchConfig) -> list[Pair]:
    """Loads the model of a run in every dtype, and compares folded with reference and dense.

    Raises:
        ParityError: a backend differs.
        ValueError: the model can't be loaded or folded, or no such backend.
    """
    pairs = []
    for dtype in config.dtype:
        base, _ = load_base(config.model, getattr(torch, dtype))
        pair = make_pair(base.to(device()), dtype, proportional=config.proportional)  # type: ignore[arg-type]  # transformers' stub
        check_pair(pair, config.backend, config.seed)
        pairs.append(pair)
    return pairs


def make_pair(model: Any, dtype: str, *, proportional: bool = False) -> Pair:
    """Folds a model in place and keeps a dense twin."""
    dense = imposed.dense_twin(model)
    policy = DMC(delay=DELAY, proportional=proportional)
    # As users load an artefact to serve it. The dense twin goes on reading its three weights.
    folded = merge_weights(fold(model, policy))
    shape = Shape.of(model.config, proportional=proportional)
    return Pair(dtype, folded, dense, shape)


def check_pair(pair: Pair, backend: str, seed: int) -> None:
    """Compares logits at cr 1 with the dense model, and in float32 at cr 2 with the reference.

    In half precision rounding alone moves the logits of SmolLM2 by 0.18 once tokens are merged
    at random, so that a comparison would say nothing; `check_backend` compares its calls.

    Raises:
        ParityError: they differ.
    """
    dtype = getattr(torch, pair.dtype)
    what = f"backend {backend}, {pair.dtype}, whole model"
    if dtype == torch.float32:
        wanted = folded_logits(pair, "reference", 2.0, seed)
        check_logits(folded_logits(pair, backend, 2.0, seed), wanted, dtype, f"{what}, cr 2")
    ids = imposed.random_ids(pair.dense, 2, sum(CHECKED), seed)
    with torch.no_grad():
        dense = pair.dense(ids).logits[:, CHECKED[0] - 1 :]
    check_logits(folded_logits(pair, backend, 1.0, seed), dense, dtype, f"{what}, cr 1 and dense")


def folded_logits(pair: Pair, backend: str, cr: float, seed: int) -> Tensor:
    """Logits of a short prefill's last token and of the steps after it, (2, steps + 1, vocab)."""
    model, (prefill, steps) = pair.folded, CHECKED
    ids = imposed.random_ids(model, 2, prefill + steps, seed)
    lengths = imposed.layer_lengths(model, pair.shape, 2, prefill, cr, seed)
    imposition = imposed.Imposition(model, lengths, prefill, steps, cr, seed)
    cache, found = new_cache(model, backend=backend), []
    with torch.no_grad(), imposition.active():
        for part in ids.split([prefill, *[1] * steps], 1):
            found.append(model(part, past_key_values=cache, logits_to_keep=1).logits)
    return torch.cat(found, 1)
