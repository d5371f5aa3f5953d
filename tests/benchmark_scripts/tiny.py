"""A tiny folded model and what it decides, for the tests of variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachefold import DMC, fold
from cachefold.core.decisions import Decisions
from cachefold.models.fold import FoldRun
from tests.models.tiny import scramble_decisions, tiny_model


def tiny_folded(delay: int = 4) -> Any:
    """Merges about half of its tokens."""
    model = fold(tiny_model(), DMC(delay=delay))
    scramble_decisions(model)
    return model


def logits_of(model: Any, ids: Tensor, **run: Any) -> tuple[Tensor, dict[int, Decisions]]:
    """Of the parallel form, and what was decided."""
    found: dict[int, Decisions] = {}
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, fold_run=FoldRun(recorder=found, **run))
    return output.logits, found
