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
from cachefold.fingerprint import fingerprint
from cachefold.models.fold import FoldRun, fold
from cachefold.models.hub import load_folded
from cachefold.retrofit.arguments import checkpoint_activations
from cachefold.retrofit.config import RetrofitConfig, from_dict
from cachefold.retrofit.data import PackedDataset
from cachefold.retrofit.prepare import load_model, prepare
from cachefold.retrofit.run import run_retrofit
from cachefold.retrofit.trainer import RetrofitTrainer
from tests.retrofit.tiny import make_model, recipe

ROOT = Path(__file__).parents[2]


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def config_of(workspace: Path, output: str, steps: int = 6, **train: object) -> RetrofitConfig:
    return from_dict(recipe(workspace, output, steps, **train))


def trainer_of(model: Any, config: RetrofitConfig, **options: Any) -> RetrofitTrainer:
    dataset = PackedDataset(torch.zeros(1, 48).long(), length=12)
    return RetrofitTrainer(model, args=config, train_dataset=dataset, **options)


def test_reaches_the_ratio_and_recovers_quality(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, "whole", 120, ramp_fraction=0.3)
    facts = run_retrofit(config)
    log = read_log(workspace / "whole")
    assert log[0]["cr"] < 1.3
    assert facts["cr"] > 1.75
    ramped = [row for row in log if row["step"] >= 40]
    assert sum(r["loss"] for r in ramped[-5:]) < sum(r["loss"] for r in ramped[:5])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("step 2/120 retrofit loss ") and "tokens/s eta 0:" in line
    saved = json.loads((workspace / "whole/final/map.json").read_text())
    assert [len(row["cr"]) for row in saved["map"]] == [2, 2]
    names = sorted(p.name for p in (workspace / "whole").glob("checkpoint-*"))
    assert names == ["checkpoint-115", "checkpoint-120"]
    final = workspace / "whole/final"
    assert (final / "log.jsonl").read_text() == (workspace / "whole/log.jsonl").read_text()
    assert (final / "recipe.yaml").read_text() == config.to_yaml()
    artefact = json.loads((final / "cachefold.json").read_text())
    revision = f"local:{fingerprint(Path(config.model))}"
    assert artefact["base"] == {"id": config.model, "revision": revision}
    loaded = load_folded(final, load_model(config)[0])
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


def test_accumulated_batches_weigh_as_one(workspace: Path) -> None:
    logs = []
    for name, batch, parts in (("at-once", 4, 1), ("in-parts", 1, 4)):
        options = {"batch_size": batch, "accumulation": parts, "relaxation": "sigmoid"}
        values = recipe(workspace, name, 4, log_every=1, dtype="float32", **options)
        run_retrofit(from_dict(values))
        logs.append(read_log(workspace / name)[1])
    for key in ("loss", "grad_norm", "kd", "cr", "alpha"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-3, abs=2e-6), key


def test_resuming_a_finished_run_changes_nothing(workspace: Path) -> None:
    config = config_of(workspace, "finished", 8)
    run_retrofit(config)
    path, log = workspace / "finished/final/cachefold.safetensors", read_log(workspace / "finished")
    before = load_file(path)
    run_retrofit(config, resume=True)
    after = load_file(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_log(workspace / "finished") == log


def test_only_adapters_and_decisions_change(workspace: Path) -> None:
    config = config_of(workspace, "frozen")
    model, _ = load_model(config)
    prepare(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".decision." in name for name in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    dataset = PackedDataset(torch.randint(0, 64, (8, 48)), length=12)
    RetrofitTrainer(model, args=config, train_dataset=dataset).train()
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
    trainer = RetrofitTrainer(
        model, args=config, train_dataset=PackedDataset(torch.zeros(1, 48).long(), length=12)
    )
    ids = torch.randint(0, 64, (2, 48))
    with torch.no_grad(), trainer._as_teacher(model) as teacher:
        hidden = trainer._hidden(teacher, ids, FoldRun(mode="dense"))
        torch.testing.assert_close(original.lm_head(hidden), original(ids).logits)
    with torch.no_grad():
        tuned = trainer._hidden(model, ids, FoldRun(mode="dense"))
    assert (tuned - hidden).abs().max() > 0.1


def test_all_weights_train_without_lora(workspace: Path) -> None:
    config = config_of(workspace, "full", lora_rank=0, learning_rate=1e-4)
    facts = run_retrofit(config)
    base = dict(load_model(config)[0].named_parameters())
    loaded = dict(load_folded(Path(facts["folder"]), make_model()).named_parameters())
    assert base.keys() < loaded.keys()
    assert not any(torch.equal(loaded[name], base[name]) for name in base)
    assert all(torch.allclose(loaded[name], base[name], atol=2e-3) for name in base)


def test_bfloat16_rounds_the_base_and_the_products_but_not_the_adapters(workspace: Path) -> None:
    config = config_of(workspace, "bf16", dtype="bfloat16")
    model, _ = load_model(config)
    prepare(model, config)
    dtypes = {("lora" in n or "decision" in n, p.dtype) for n, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    ids = torch.randint(0, 64, (1, 48))
    assert trainer_of(model, config)._hidden(model, ids, FoldRun()).dtype == torch.bfloat16
    coarse = read_log(Path(run_retrofit(config)["folder"]).parent)
    run_retrofit(config_of(workspace, "fp32"))
    fine = read_log(workspace / "fp32")
    for one, two in zip(coarse, fine, strict=True):
        assert one["ce"] != two["ce"] and one["ce"] == pytest.approx(two["ce"], rel=0.05)


def test_cross_entropy_and_straight_through_change_the_loss(workspace: Path) -> None:
    run_retrofit(config_of(workspace, "ce", ce_weight=0.5, relaxation="straight-through"))
    for row in read_log(workspace / "ce"):
        expected = row["kd"] + 0.5 * row["ce"] + 5.0 * row["compression"]
        assert row["ce"] > 1 and row["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_distance_of_hidden_states_counts_when_asked(workspace: Path) -> None:
    run_retrofit(config_of(workspace, "hidden", hidden_weight=2.0))
    run_retrofit(config_of(workspace, "logits"))
    matched = read_log(workspace / "hidden")
    assert "hidden" not in read_log(workspace / "logits")[0]
    for row in matched:
        expected = row["kd"] + 2.0 * row["hidden"] + 5.0 * row["compression"]
        assert row["loss"] == pytest.approx(expected, abs=1e-5)
    assert matched[-1]["hidden"] > 1e-4


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_is_on_and_changes_no_gradient(workspace: Path) -> None:
    states = []
    for name, on in (("gc-off", False), ("gc-on", True)):
        config = config_of(workspace, name, 4, gradient_checkpointing=on)
        model, _ = load_model(config)
        prepare(model, config)
        trainer_of(model, config)
        layers = model.model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [on] * len(layers)
        facts = run_retrofit(config)
        states.append(load_file(Path(facts["folder"]) / "cachefold.safetensors"))
    torch.testing.assert_close(states[0], states[1])


def test_gradient_checkpointing_under_its_old_name() -> None:
    class Old:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
            self.seen = gradient_checkpointing_kwargs

    model: Any = Old()
    checkpoint_activations(model)
    assert model.seen == {"use_reentrant": False}


def test_the_teacher_knows_no_dropout_and_modes_come_back(workspace: Path) -> None:
    config = config_of(workspace, "dropout")
    original, _ = load_model(config)
    model, _ = load_model(config)
    prepare(model, config)
    model.train()
    model.model.norm.eval()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    trainer = trainer_of(model, config)
    ids = torch.randint(0, 64, (2, 48))
    with torch.no_grad(), trainer._as_teacher(model) as teacher:
        hidden = trainer._hidden(teacher, ids, FoldRun(mode="dense"))
        torch.testing.assert_close(original.eval().lm_head(hidden), original(ids).logits)
    assert model.model.layers[0].training and not model.model.norm.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


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
    trainer = RetrofitTrainer(
        model, args=config, train_dataset=PackedDataset(torch.zeros(1, 48).long(), length=12)
    )
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
        RetrofitTrainer(model, args=config, train_dataset=PackedDataset(torch.zeros(1, 48).long()))


def test_noise_depends_on_step_and_micro_step_alone(workspace: Path) -> None:
    config = config_of(workspace, "noise")
    model, _ = load_model(config)
    prepare(model, config)
    trainer = RetrofitTrainer(
        model, args=config, train_dataset=PackedDataset(torch.zeros(1, 48).long(), length=12)
    )

    def alpha(step: int, micro: int) -> torch.Tensor:
        torch.rand(5)
        seen: dict[int, Decisions] = {}
        with torch.no_grad(), trainer._noise(torch.device("cpu"), step, micro):
            trainer._hidden(model, torch.ones(1, 48).long(), FoldRun(mode="relaxed", recorder=seen))
        return seen[1].alpha

    assert torch.equal(alpha(3, 1), alpha(3, 1))
    assert not torch.equal(alpha(3, 1), alpha(3, 0))
    assert not torch.equal(alpha(3, 1), alpha(4, 1))
