"""`cachefold retrofit`."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import Run
from tests.retrofit.tiny import make_workspace, recipe


@pytest.fixture(autouse=True)
def denormals() -> object:
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-retrofit")
    make_workspace(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, steps=2)))
    return folder


def test_dry_run_trains_nothing(cli: Run, workspace: Path) -> None:
    out = workspace / "dry"
    result = cli("retrofit", workspace / "recipe.yaml", f"output_dir={out}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "2 steps, 192 tokens" in result.stdout and not out.exists()


def test_trains_then_resumes_a_run_folder(cli: Run, workspace: Path) -> None:
    out = workspace / "out"
    result = cli("retrofit", workspace / "recipe.yaml", "train.save_every=1")
    assert result.exit_code == 0, result.output
    assert "held-out cr" in result.stdout and "compression map" in result.stdout
    again = cli("retrofit", out)
    assert again.exit_code == 2 and "--resume" in again.stderr
    shutil.rmtree(out / "checkpoint-2")
    shutil.rmtree(out / "final")
    resumed = cli("retrofit", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "step 1/" not in resumed.stdout and "step 2/2" in resumed.stdout
    assert (out / "final/cachefold.json").is_file()


def test_moved_run_folder_is_refused(cli: Run, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((workspace / "recipe.yaml").read_text())
    result = cli("retrofit", tmp_path, "--resume")
    assert result.exit_code == 2 and "was started with output_dir" in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.tokns=3", "tokens"), ("policy.cr=0.5", "number >= 1"), ("nothing", "override")],
)
def test_bad_overrides(cli: Run, workspace: Path, override: str, message: str) -> None:
    result = cli("retrofit", workspace / "recipe.yaml", override, "--dry-run")
    assert result.exit_code == 2 and message in result.stderr


def test_dry_run_and_resume_look_at_the_folder(cli: Run, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    base = ("retrofit", workspace / "recipe.yaml", f"output_dir={tmp_path}")
    for option, message in (("--dry-run", "not empty"), ("--resume", "no run to resume")):
        result = cli(*base, option)
        assert result.exit_code == 2 and message in result.stderr, option


def test_resume_without_a_checkpoint_starts_at_step_1(
    cli: Run, workspace: Path, tmp_path: Path
) -> None:
    values = recipe(workspace, steps=2, log_every=1) | {"output_dir": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = cli("retrofit", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert "no checkpoint yet, starting at step 1\nstep 1/2 retrofit loss" in result.stdout


def test_failed_start_can_be_repeated(cli: Run, workspace: Path, tmp_path: Path) -> None:
    base = ("retrofit", workspace / "recipe.yaml", f"output_dir={tmp_path / 'out'}")
    failed = cli(*base, f"model={tmp_path}")
    assert failed.exit_code == 2 and "can't load base model" in failed.stderr
    assert "Traceback" not in failed.output
    assert cli(*base).exit_code == 0


def test_no_recipe(cli: Run, tmp_path: Path) -> None:
    assert "no recipe" in cli("retrofit", tmp_path / "x.yaml").stderr
    assert "no run to resume" in cli("retrofit", tmp_path, "--resume").stderr


def test_dry_run_of_a_paper_recipe_needs_no_weights(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it used the network"))
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("llama2-*.yaml"))
    assert len(recipes) == 3
    for path in recipes:
        result = cli("retrofit", path, f"output_dir={tmp_path / 'out'}", "--dry-run")
        assert result.exit_code == 0, result.output
        assert "8,250 steps of 4,194,304 tokens, 34,603,008,000 tokens in all" in result.stdout
        assert "are not on this machine" in result.stdout
