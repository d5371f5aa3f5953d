"""A folded model does on a GPU what it does on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cachefold
from cachefold.models.fold import FoldRun, fold
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

pytestmark = pytest.mark.gpu


def passes(model: Any, ids: torch.Tensor, run: FoldRun) -> list[torch.Tensor]:
    """Logits, and the gradient of all parameters that have one."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, use_cache=False, fold_run=run).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.detach().cpu() for x in (logits, *gradients)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"window": 12}, {"proportional": True}])
def test_training_is_that_of_a_cpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from cachefold.attention import triton_scan

    calls, scan = [], triton_scan.running_means
    note = lambda *x: calls.append(len(x)) or scan(*x)  # noqa: E731
    monkeypatch.setattr(triton_scan, "running_means", note)
    policy = cachefold.DMC(cr=4, delay=4, **options)
    model = fold(tiny_model(head_dim=16), policy)
    scramble_decisions(model)
    ids, run = random_ids(2, 150), FoldRun(mode="relaxed", relaxation="sigmoid")
    on_cpu = passes(copy.deepcopy(model), ids, run)
    assert not calls
    on_gpu = passes(model.to("cuda"), ids, run)
    assert len(calls) == 2  # layers
    assert len(on_cpu) == len(on_gpu) > 10
    for got, want in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)
