"""What a retrofit refuses, and what it leaves behind when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from cachefold.retrofit.config import RetrofitConfig, from_dict
from cachefold.retrofit.prepare import load_model, prepare
from cachefold.retrofit.run import finish, run_retrofit
from cachefold.retrofit.trainer import RetrofitDivergedError, RetrofitTrainer
from tests.models.tiny import forbid_loading
from tests.retrofit.tiny import recipe


def config_of(workspace: Path, output: str, steps: int = 6, **train: object) -> RetrofitConfig:
    return from_dict(recipe(workspace, output, steps, **train))


def poison(monkeypatch: pytest.MonkeyPatch, step: int, where: str) -> None:
    """Makes the loss or only its gradient NaN at a step (0 = first)."""
    original = RetrofitTrainer._distil

    def poisoned(self: RetrofitTrainer, *args: Any) -> Any:
        loss, kd, ce = original(self, *args)
        if self.state.global_step == step and where == "loss":
            loss = loss * float("nan")
        elif self.state.global_step == step:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, kd, ce

    monkeypatch.setattr(RetrofitTrainer, "_distil", poisoned)


@pytest.mark.parametrize(
    ("where", "message"),
    [("loss", "the loss is nan at step 8"), ("gradient", "the gradient norm is nan at step 8")],
)
def test_nan_stops_and_keeps_checkpoints(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, where: str, message: str
) -> None:
    poison(monkeypatch, 7, where)
    output = workspace / f"nan-{where}"
    with pytest.raises(RetrofitDivergedError, match=f"{message}.*checkpoints so far are kept"):
        run_retrofit(config_of(workspace, output.name, 12, save_every=1))
    names = sorted(path.name for path in output.glob("checkpoint-*"))
    assert names == ["checkpoint-6", "checkpoint-7"]
    state = load_file(output / "checkpoint-7/trainable.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_nan_gradient_of_the_last_step_makes_no_artefact(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 5, "gradient")
    with pytest.raises(RetrofitDivergedError, match="at step 6"):
        run_retrofit(config_of(workspace, "nan-last"))
    assert not (workspace / "nan-last/final").exists()


def test_a_dry_run_looks_at_the_gradient(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 0, "gradient")
    with pytest.raises(RetrofitDivergedError, match="gradient norm is nan"):
        run_retrofit(config_of(workspace, "nan-dry"), dry_run=True)


@pytest.mark.parametrize(("what", "step"), [("weight", 5), ("weight", 6), ("moment", 5)])
def test_nothing_that_is_not_finite_is_published(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, what: str, step: int
) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != step:
                return
            moments = next(iter(kwargs["optimizer"].state.values()))
            weights = (p for p in kwargs["model"].parameters() if p.requires_grad)
            target = next(weights) if what == "weight" else moments["exp_avg"]
            with torch.no_grad():
                target.view(-1)[0] = float("inf")

    original = RetrofitTrainer.__init__

    def with_poison(self: RetrofitTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Poison())

    monkeypatch.setattr(RetrofitTrainer, "__init__", with_poison)
    output = workspace / f"inf-{what}-{step}"
    with pytest.raises(RetrofitDivergedError, match=f"is not finite after step {step}"):
        run_retrofit(config_of(workspace, output.name, 6, save_every=5))
    names = {path.name for path in output.iterdir() if path.is_dir()}
    assert names == ({"checkpoint-5"} if step == 6 else set())


def test_final_artefact_is_checked_on_its_own(workspace: Path) -> None:
    config = config_of(workspace, "inf-final", 3)
    model, _ = load_model(config)
    prepare(model, config)
    with torch.no_grad():
        model.model.layers[0].self_attn.decision.bias[0] = float("nan")
    with pytest.raises(RetrofitDivergedError, match="decision.bias is not finite after step 3"):
        finish(model, config, torch.zeros(1, 48).long(), {}, 100)
    assert not (workspace / "inf-final").exists()


def test_folder_in_use_and_changed_recipe_are_refused(workspace: Path) -> None:
    run_retrofit(config_of(workspace, "used"))
    for dry_run in (False, True):
        with pytest.raises(ValueError, match="not empty; pass --resume"):
            run_retrofit(config_of(workspace, "used"), dry_run=dry_run)
        with pytest.raises(ValueError, match="another recipe"):
            run_retrofit(config_of(workspace, "used", seed=9), resume=True, dry_run=dry_run)
    (workspace / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_retrofit(config_of(workspace, "file"))


@pytest.mark.parametrize("failure", ["model", "data", "processes"])
def test_a_failed_start_leaves_the_folder_free(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    values = recipe(workspace, f"failed-{failure}", 2)
    good = from_dict(values)
    with pytest.MonkeyPatch.context() as patch:
        if failure == "model":
            values["model"] = str(workspace / "no-model")
        elif failure == "data":
            values["data"] = {**values["data"], "files": ["none.txt"]}
        else:
            patch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
        with pytest.raises(ValueError):
            run_retrofit(from_dict(values))
    assert not list((workspace / f"failed-{failure}").glob("*"))
    assert run_retrofit(good)["steps"] == 2


@pytest.mark.parametrize("dry_run", [False, True])
def test_text_that_is_not_there_is_told_before_a_model_is_loaded(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    forbid_loading(monkeypatch)
    values = recipe(workspace, "no-text")
    for files, message in (
        ([*values["data"]["files"], "nosuch.jsonl"], "no text file at nosuch.*check data.files"),
        ([str(workspace / "model" / "config.json")], "text files end in .*check data.files"),
        ([], "names no text: set data.files"),
    ):
        values["data"]["files"] = files
        with pytest.raises(ValueError, match=message):
            run_retrofit(from_dict(values), dry_run=dry_run)


def test_a_model_that_is_not_there_is_a_value_error(workspace: Path) -> None:
    values = recipe(workspace, "no-model")
    values["model"] = str(workspace / "text.jsonl")
    with pytest.raises(ValueError, match="can't load base model"):
        run_retrofit(from_dict(values))


def test_resume_needs_a_run(workspace: Path) -> None:
    (workspace / "stray").mkdir()
    (workspace / "stray/notes.txt").write_text("")
    for name in ("stray", "nowhere"):
        with pytest.raises(ValueError, match="no run to resume in .*recipe.yaml is missing"):
            run_retrofit(config_of(workspace, name), resume=True)
    assert [path.name for path in (workspace / "stray").iterdir()] == ["notes.txt"]


def test_resume_before_the_first_checkpoint_says_so(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(workspace, "early", 2)
    (workspace / "early").mkdir()
    (workspace / "early/recipe.yaml").write_text(config.to_yaml())
    run_retrofit(config, resume=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no checkpoint yet, starting at step 1" and lines[1].startswith("step 2/2")


def test_resume_compares_recipes_by_meaning(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_retrofit(config_of(workspace, "meaning", 8, save_every=4, log_every=4))
    stored = workspace / "meaning/recipe.yaml"
    values = yaml.safe_load(stored.read_text())
    del values["train"]["max_grad_norm"], values["data"]["split"]  # defaults, as an old run had
    values["train"]["decision_learning_rate"] = "5e-2"
    stored.write_text("# mine\n" + yaml.safe_dump(values, sort_keys=True))
    (workspace / "meaning/checkpoint-8/trainer_state.json").rename(workspace / "state.json")
    for path in (workspace / "meaning/checkpoint-8").iterdir():
        path.unlink()
    (workspace / "meaning/checkpoint-8").rmdir()
    capsys.readouterr()
    # How often it logs and saves may change on the way: no weight depends on it.
    run_retrofit(config_of(workspace, "meaning", 8, save_every=2, log_every=1), resume=True)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert steps == ["5/8", "6/8", "7/8", "8/8"]
    assert sorted(p.name for p in (workspace / "meaning").glob("checkpoint-*")) == [
        "checkpoint-6", "checkpoint-8",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("n_gpu", 2)])
def test_several_processes_or_gpus_are_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(TrainingArguments, name, property(lambda self: value))
    with pytest.raises(ValueError, match="one process on one device for now.*CUDA_VISIBLE_DEV"):
        run_retrofit(config_of(workspace, "many"), dry_run=True)


def test_dry_run_writes_nothing(workspace: Path) -> None:
    facts = run_retrofit(config_of(workspace, "dry"), dry_run=True)
    assert facts["steps"] == 6 and facts["trainable"] > 0
    assert facts["loss"] > 0 and facts["seconds"] > 0
    assert not (workspace / "dry").exists()
