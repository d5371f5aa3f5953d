"""What a retrofit takes, without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from cachefold.retrofit.arguments import parameter_groups
from cachefold.retrofit.config import RetrofitConfig, TrainConfig, from_dict
from cachefold.retrofit.plan import plan_retrofit
from cachefold.retrofit.prepare import load_model, prepare
from cachefold.retrofit.run import run_retrofit
from cachefold.zoo import is_shape_only
from tests.retrofit.tiny import recipe

LLAMA = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("train", "copies"),
    [({"lora_rank": 2}, 0), ({"lora_rank": 0}, 1), ({"lora_rank": 0, "kd_weight": 0}, 0)],
)
def test_the_plan_counts_what_a_run_holds(workspace: Path, train: dict, copies: int) -> None:
    config = from_dict(recipe(workspace, "planned", 6, ce_weight=1, **train))
    plan = plan_retrofit(config)
    model, _ = load_model(config)
    base = sum(p.numel() for p in model.parameters())
    teacher = prepare(model, config)
    assert (teacher is not None) == copies
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trainable == sum(p.numel() for p in trained)
    assert plan.memory["gradients"] == 4 * plan.trainable == plan.memory["AdamW"] / 2
    assert plan.memory["teacher"] == 4 * base * copies
    assert plan.tokens == 6 * 96 and sum(plan.steps.values()) == 6


def test_a_dry_run_without_weights_is_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = RetrofitConfig(model=LLAMA, output_dir=str(tmp_path / "out"))
    assert is_shape_only(LLAMA) and not is_shape_only("smollm2-135m")
    assert run_retrofit(config, dry_run=True) == {}
    out = capsys.readouterr().out
    assert (
        "6,755,194,880 parameters, 16,779,264 of them trained" in out
        and "memory of the device: 12.8 GiB (weights 12.6 GiB" in out
    )
    assert not (tmp_path / "out").exists()


def test_downloaded_weights_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    for name, text in (("refs/main", "abc"), ("snapshots/abc/model.safetensors.index.json", "{}")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    assert not is_shape_only(LLAMA)


def test_weight_decay_is_for_matrices_alone() -> None:
    train = TrainConfig(weight_decay=0.1, learning_rate=1e-4, decision_learning_rate=1e-2)
    decision = nn.ModuleDict({"decision": nn.Linear(2, 1)})
    model = nn.ModuleDict({"linear": nn.Linear(2, 3), "layer": decision})
    groups = parameter_groups(model, train)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-4, 0.1, 1), (1e-4, 0.0, 1), (1e-2, 0.0, 2),
    ]  # fmt: skip
    assert torch.equal(groups[0]["params"][0], model["linear"].weight)
