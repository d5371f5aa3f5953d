"""Whole retrofits of a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Phi3Config, Qwen3Config

from cachefold.core.decisions import Decisions
from cachefold.models.fold import FoldRun, fold
from cachefold.models.hub import load_folded
from cachefold.retrofit.config import RetrofitConfig, from_dict
from cachefold.retrofit.data import PackedDataset
from cachefold.retrofit.run import load_model, prepare, run_retrofit
from cachefold.retrofit.trainer import RetrofitDivergedError, RetrofitTrainer
from tests.retrofit.tiny import make_model, recipe

ROOT = Path(__file__).parents[2]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def config_of(workspace: Path, output: str, steps: int = 6, **train: object) -> RetrofitConfig:
    return from_dict(recipe(workspace, output, steps, **train))


def test_reaches_the_ratio_and_recovers_quality(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, "whole", 120, ramp_fraction=0.3, cr_margin=0.15)
    facts = run_retrofit(config)
    log = read_log(workspace / "whole")
    assert log[0]["cr"] < 1.3
    assert facts["cr"] > 1.95
    ramped = [row for row in log if row["step"] >= 40]
    assert sum(r["loss"] for r in ramped[-5:]) < sum(r["loss"] for r in ramped[:5])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("step 2/120 loss ") and "tokens/s eta 0:" in line
    saved = json.loads((workspace / "whole/final/map.json").read_text())
    assert [len(row["cr"]) for row in saved["map"]] == [2, 2]
    names = sorted(p.name for p in (workspace / "whole").glob("checkpoint-*"))
    assert names == ["checkpoint-115", "checkpoint-120"]
    loaded = load_folded(workspace / "whole/final", load_model(config)[0])
    assert loaded(torch.arange(8)[None]).logits.shape == (1, 8, 64)


def test_killed_and_resumed_equals_uninterrupted(workspace: Path) -> None:
    for name in ("straight", "killed"):
        values = recipe(workspace, name, 24, accumulation=2, save_every=4, log_every=1)
        (workspace / f"{name}.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "tests.retrofit.tiny"]
    quiet: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run([*command, str(workspace / "straight.json")], check=True, **quiet)
    process = subprocess.Popen([*command, str(workspace / "killed.json")], **quiet)
    log, deadline = workspace / "killed/log.jsonl", time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workspace / "killed/final").exists()
    subprocess.run([*command, str(workspace / "killed.json"), "--resume"], check=True, **quiet)

    for name in ("final/cachefold.safetensors", "checkpoint-12/trainable.safetensors"):
        one, two = load_file(workspace / "straight" / name), load_file(workspace / "killed" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    straight, killed = read_log(workspace / "straight"), read_log(workspace / "killed")
    assert [row["loss"] for row in straight] == [row["loss"] for row in killed]


def test_resuming_a_finished_run_changes_nothing(workspace: Path) -> None:
    config = config_of(workspace, "finished", 8)
    run_retrofit(config)
    path, log = workspace / "finished/final/cachefold.safetensors", read_log(workspace / "finished")
    before = load_file(path)
    run_retrofit(config, resume=True)
    after = load_file(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_log(workspace / "finished") == log


def test_folder_in_use_and_changed_recipe_are_refused(workspace: Path) -> None:
    run_retrofit(config_of(workspace, "used"))
    with pytest.raises(ValueError, match="not empty; pass --resume"):
        run_retrofit(config_of(workspace, "used"))
    with pytest.raises(ValueError, match="another recipe"):
        run_retrofit(config_of(workspace, "used", seed=9), resume=True)
    (workspace / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_retrofit(config_of(workspace, "file"))


def test_dry_run_writes_nothing(workspace: Path) -> None:
    facts = run_retrofit(config_of(workspace, "dry"), dry_run=True)
    assert facts["steps"] == 6 and facts["trainable"] > 0
    assert facts["loss"] > 0 and facts["seconds"] > 0
    assert not (workspace / "dry").exists()


def test_nan_stops_and_keeps_checkpoints(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RetrofitTrainer._distil

    def poisoned(self: RetrofitTrainer, *args: Any) -> Any:
        loss, kd, ce = original(self, *args)
        return (loss * float("nan") if self.state.global_step == 7 else loss), kd, ce

    monkeypatch.setattr(RetrofitTrainer, "_distil", poisoned)
    with pytest.raises(RetrofitDivergedError, match="nan at step 8"):
        run_retrofit(config_of(workspace, "nan", 12))
    assert (workspace / "nan/checkpoint-5/trainable.safetensors").is_file()


def test_only_adapters_and_decisions_change(workspace: Path) -> None:
    config = config_of(workspace, "frozen")
    model, _ = load_model(config)
    prepare(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".decision." in name for name in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    dataset = PackedDataset(torch.randint(0, 64, (8, 48)), length=12)
    RetrofitTrainer(model, config, dataset).train()
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same != (name in trained), name
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_teacher_is_the_original_and_hidden_states_are_after_the_norm(workspace: Path) -> None:
    config = config_of(workspace, "teacher")
    original, _ = load_model(config)
    model, _ = load_model(config)
    prepare(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trainer = RetrofitTrainer(model, config, PackedDataset(torch.zeros(1, 48).long(), length=12))
    ids = torch.randint(0, 64, (2, 48))
    with torch.no_grad(), trainer._as_teacher(model) as teacher:
        hidden = trainer._hidden(teacher, ids, FoldRun(mode="dense"))
        torch.testing.assert_close(original.lm_head(hidden), original(ids).logits)
    with torch.no_grad():
        tuned = trainer._hidden(model, ids, FoldRun(mode="dense"))
    assert (tuned - hidden).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": 0, "learning_rate": 1e-4},
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"ce_weight": 0.5, "relaxation": "straight-through"},
        {"tensorboard": True},
    ],
    ids=str,
)
def test_variants_train(workspace: Path, options: dict[str, Any]) -> None:
    name = "-".join(options)
    facts = run_retrofit(config_of(workspace, name, **options))
    loaded = load_folded(Path(facts["folder"]), make_model())
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()
    if "tensorboard" in options:
        assert list((workspace / name).rglob("events.out.tfevents*"))


def test_gradient_checkpointing_changes_no_gradient(workspace: Path) -> None:
    states = []
    for name, on in (("gc-off", False), ("gc-on", True)):
        facts = run_retrofit(config_of(workspace, name, 4, gradient_checkpointing=on))
        states.append(load_file(Path(facts["folder"]) / "cachefold.safetensors"))
    torch.testing.assert_close(states[0], states[1])


def test_neuron_policy_with_zero_out(workspace: Path) -> None:
    values = recipe(workspace, "neuron", 8, zero_out_steps=4)
    values["policy"] |= {"decision": "neuron"}
    run_retrofit(from_dict(values))
    assert read_log(workspace / "neuron")[0]["target"] == 1.0


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (Phi3Config, {"pad_token_id": 0}),
        (Qwen3Config, {"head_dim": 8}),
        (Gemma2Config, {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 5.0}),
    ],
)
def test_loss_equals_the_plain_one_in_other_families(
    workspace: Path, config_class: Any, options: dict[str, Any]
) -> None:
    config = config_of(workspace, "family", ce_weight=0.5, compression_weight=0.0)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(config_class(**shape, **heads, **options)).float()
    prepare(model, config)
    trainer = RetrofitTrainer(model, config, PackedDataset(torch.zeros(1, 48).long(), length=12))
    ids = torch.randint(0, 64, (2, 48))
    loss = trainer.compute_loss(model, {"input_ids": ids})
    with trainer._noise(ids.device, 0, 0):
        logits = model(ids, use_cache=False, fold_run=FoldRun(mode="relaxed")).logits
    target = model(ids, use_cache=False, fold_run=FoldRun(mode="dense")).logits  # LoRA starts at 0
    logp, logq = logits.log_softmax(-1), target.log_softmax(-1)
    kd = (logq.exp() * (logq - logp)).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(logp[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, kd + 0.5 * ce)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".decision." in n)


def test_needs_a_teacher(workspace: Path) -> None:
    config = config_of(workspace, "none")
    model = fold(make_model(), config.build_policy())
    with pytest.raises(ValueError, match="own teacher"):
        RetrofitTrainer(model, config, PackedDataset(torch.zeros(1, 48).long()))


def test_noise_depends_on_step_and_micro_step_alone(workspace: Path) -> None:
    config = config_of(workspace, "noise")
    model, _ = load_model(config)
    prepare(model, config)
    trainer = RetrofitTrainer(model, config, PackedDataset(torch.zeros(1, 48).long(), length=12))

    def alpha(step: int, micro: int) -> torch.Tensor:
        torch.rand(5)
        seen: dict[int, Decisions] = {}
        with torch.no_grad(), trainer._noise(torch.device("cpu"), step, micro):
            trainer._hidden(model, torch.ones(1, 48).long(), FoldRun(mode="relaxed", recorder=seen))
        return seen[1].alpha

    assert torch.equal(alpha(3, 1), alpha(3, 1))
    assert not torch.equal(alpha(3, 1), alpha(3, 0))
    assert not torch.equal(alpha(3, 1), alpha(4, 1))
