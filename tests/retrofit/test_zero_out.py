"""The zero-out stage of the neuron decisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cachefold.models.fold import FoldRun
from cachefold.retrofit.config import RetrofitConfig, from_dict
from cachefold.retrofit.run import run_retrofit
from cachefold.retrofit.trainer import RetrofitTrainer
from tests.retrofit.tiny import recipe

STAGE, STEPS = 5, 8


def config_of(workspace: Path, output: str) -> RetrofitConfig:
    values = recipe(
        workspace, output, STEPS, zero_out_steps=STAGE, lora_rank=0, learning_rate=1e-3,
        save_every=1, log_every=1,
    )  # fmt: skip
    values["policy"] |= {"decision": "neuron"}
    return from_dict(values)


def neurons(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of the last channel of all heads of q and k."""
    names = [n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight"))]
    return torch.cat([weights[n].detach().unflatten(0, (-1, 8))[:, -1] for n in names])


def test_zero_out_then_decisions(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FoldRun] = []
    seen: dict[int, torch.Tensor] = {}
    original = RetrofitTrainer._hidden

    def spy(self: RetrofitTrainer, model: Any, ids: Any, run: FoldRun) -> Any:
        if run.mode != "dense":
            runs.append(run)
            seen[self.state.global_step] = neurons(dict(model.named_parameters())).clone()
        return original(self, model, ids, run)

    monkeypatch.setattr(RetrofitTrainer, "_hidden", spy)
    run_retrofit(config_of(workspace, "neuron"))
    assert [run.mode for run in runs] == ["append"] * STAGE + ["relaxed"] * (STEPS - STAGE)
    assert [run.zero_out for run in runs] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    for step, rows in seen.items():
        assert (rows == 0).all() == (step == STAGE), step
    rows = [json.loads(line) for line in (workspace / "neuron/log.jsonl").open()]
    assert [row["stage"] for row in rows[:STAGE]] == ["zero_out"] * STAGE
    assert all(row["cr"] == row["target"] == 1 and row["alpha"] == 0 for row in rows[:STAGE])
    assert rows[0]["kd"] == pytest.approx(0, abs=1e-6)  # nothing is gone yet
    assert rows[2]["kd"] > 1e-4
    assert rows[STAGE]["alpha"] > 0


@pytest.mark.parametrize("stop", [STAGE - 1, STAGE, STAGE + 1])
def test_resuming_around_the_end_of_the_stage_changes_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    class Stopped(Exception):
        pass

    straight, config = config_of(workspace, "neuron-straight"), config_of(workspace, f"n-{stop}")
    if not (workspace / "neuron-straight").exists():
        run_retrofit(straight)
    original = RetrofitTrainer.compute_loss

    def stopping(self: RetrofitTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == stop:
            raise Stopped
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RetrofitTrainer, "compute_loss", stopping)
        with pytest.raises(Stopped):
            run_retrofit(config)
    run_retrofit(config, resume=True)
    one, two = (
        load_file(workspace / name / "final/cachefold.safetensors")
        for name in ("neuron-straight", f"n-{stop}")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
