"""The table of a retrofit: what is called dense is the original model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachefold import DMC, GQA, fold, save_folded
from cachefold.evaluation.heldout import measure_artefact
from cachefold.models.lora import add_lora
from cachefold.zoo import load_base
from tests.retrofit.tiny import make_workspace


@pytest.fixture
def base(tmp_path: Path) -> str:
    make_workspace(tmp_path)
    return str(tmp_path / "model")


@pytest.mark.parametrize("rank", [0, 4])
def test_the_baseline_is_the_original_model_whatever_was_trained(base: str, rank: int) -> None:
    model = fold(load_base(base, torch.float32)[0], DMC(cr=2, delay=4))
    for name, parameter in (add_lora(model, rank) if rank else model).named_parameters():
        if "o_proj.weight" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    folder = save_folded(model, Path(base).parent / "art", base={"id": base, "revision": "none"})
    changed = measure_artefact(folder, pieces=1, tokens=48, dtype="float32")
    fresh = fold(load_base(base, torch.float32)[0], DMC(cr=2, delay=4))
    folder = save_folded(fresh, folder.parent / "fresh", base={"id": base, "revision": "none"})
    wanted = measure_artefact(folder, pieces=1, tokens=48, dtype="float32")
    for one, other in zip(changed["files"], wanted["files"], strict=True):
        assert one["dense_loss"] == pytest.approx(other["dense_loss"], abs=1e-5)
        assert abs(one["increase"]) > 1e-3 > abs(other["increase"])


@pytest.mark.parametrize("extra", [{}, {"cr": 2.0}])
def test_a_policy_without_a_ratio_is_named_by_the_one_it_reached(base: str, extra: dict) -> None:
    model = fold(load_base(base, torch.float32)[0], GQA(kv_heads=1))
    folder = save_folded(
        model, Path(base).parent / "art", base={"id": base, "revision": "none"}, extra=extra
    )
    assert measure_artefact(folder, pieces=1, tokens=48, dtype="float32")["cr"] == 2.0
