"""An ablation is trained and measured under its variant, and what is stored says so."""

from __future__ import annotations

import doctest
import json
import os
import signal
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import pytest

import ablations
from cachefold.core import decisions
from cachefold.models import attention
from cachefold.retrofit import data

FACTS = {
    "mean_increase": 0.5,
    "files": [{"name": "chat", "increase": 0.5, "cr": 2.0}],
    "machine": "any",
}
STEPS = [{"kd": 9.0, "target": 2.0}] * 9 + [
    {"kd": 0.25, "target": 2.0}, {"kd": 0.0, "target": 4.0}, {"kd": 1.0, "target": 8.0}
]  # fmt: skip


@pytest.mark.parametrize("variant", [None, "sinks"])
def test_a_run_is_trained_and_measured_under_its_variant(
    variant: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    under: list[bool] = []

    def note(*_: object, **__: object) -> Any:
        under.append(attention.constrain is not decisions.constrain)
        final = Path("runs/ablations/any/final")
        final.mkdir(exist_ok=True)
        (final / "log.jsonl").write_text("".join(json.dumps(s) + "\n" for s in STEPS))
        return FACTS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "run_retrofit", note)
    monkeypatch.setattr(ablations, "measure_artefact", note)
    monkeypatch.setattr(ablations, "read_config", lambda _: {"dial": {}})
    changes = ["train.seed=3", *([f"variant={variant}"] if variant else [])]
    found = ablations.run("any", changes, pieces=1)
    assert under == [variant is not None] * 4  # one training, three ratios
    assert (found["changes"], found["machine"]) == (changes, "any")
    assert Path("runs/ablations/any/variant").read_text() == (variant or "")
    assert found["8"] == {"increase": 0.5, "files": {"chat": [0.5, 2.0]}}
    assert attention.constrain is decisions.constrain
    assert found["divergence"] == {"low": 0.125, "high": 1.0}
    row = "| any | any | +0.5000 | +0.5000 | +0.5000 | 0.125 | 1.000 |"
    assert ablations.table({"any": found}).endswith(row)


def test_nothing_is_measured_off_the_ratio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "run_retrofit", lambda *_, **__: None)
    monkeypatch.setattr(ablations, "read_config", lambda _: {})
    with pytest.raises(ValueError, match="not calibrated"):
        ablations.run("any", [], pieces=1)


def test_examples_run() -> None:
    assert doctest.testmod(ablations).attempted and not doctest.testmod(ablations).failed


def test_what_was_measured_otherwise_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {cr: {"increase": 0.5} for cr in ("2", "4", "8")}
    (tmp_path / "x.json").write_text(
        json.dumps({"base": found | {"changes": [], "pieces": 12, "machine": "any"}})
    )
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "x.json")
    monkeypatch.setattr("sys.argv", ["ablations.py", "base"])
    with pytest.raises(SystemExit, match="0"):
        ablations.main()
    assert "base was measured with --pieces 12, now 3" in capsys.readouterr().err


def test_a_table_has_no_divergence_where_none_was_measured() -> None:
    found = {cr: {"increase": 0.5} for cr in ("2", "4", "8")}
    machines = {"a": "x86_64, 1 threads", "b": "NVIDIA H200"}
    rows = ablations.table({name: found | {"machine": m} for name, m in machines.items()})
    increases = "| +0.5000 | +0.5000 | +0.5000 |"
    assert rows.splitlines()[2:] == [
        f"| a | CPU {increases}  |  |", f"| b | NVIDIA H200 {increases}  |  |",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", ["", "sinks"])
def test_a_run_is_reused_under_its_variant_only(
    variant: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "CALIBRATION_TOKENS", 128)
    monkeypatch.setattr(ablations, "measure_artefact", lambda *_, **__: FACTS)
    changes = [
        f"model={workspace / 'model'}", f"data.files=[{workspace / 'text.jsonl'}]",
        "data.seq_len=48", "data.held_out=4", "train.tokens=384", "train.batch_size=2",
        "train.accumulation=1", "train.dtype=float32",
    ]  # fmt: skip
    own = [f"variant={variant}"] if variant else []
    ablations.run("any", changes + own, pieces=1)
    folder = Path("runs/ablations/any")
    artefact = folder / "final" / "cachefold.json"
    written = artefact.stat().st_mtime_ns
    for other in {"", "sinks", "hybrid"} - {variant}:
        with pytest.raises(ValueError, match="trained under .*; move or delete it"):
            ablations.run("any", changes + ([f"variant={other}"] if other else []), pieces=1)
    with pytest.raises(ValueError, match="had another recipe"):  # not the old weights as new ones
        ablations.run("any", [*changes, "train.seed=9", *own], pieces=1)
    if not variant:
        (folder / "variant").unlink()  # as runs had it that were made before
    ablations.run("any", changes + own, pieces=1)
    assert (folder / "variant").read_text() == variant
    assert artefact.stat().st_mtime_ns == written


def test_one_that_fails_leaves_the_others_running(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [
        f"model={workspace / 'model'}", f"data.files=[{workspace / 'text.jsonl'}]",
        "data.seq_len=48", "data.held_out=4", "train.tokens=96", "train.batch_size=1",
        "train.dtype=float32",
    ]  # fmt: skip
    wild = [*changes, "train.learning_rate=1e30", "train.decision_learning_rate=1e30"]
    wanted = {"typo": ["train.lora_rnk=4"], "wild": wild, "small": [*changes, "policy.delay=4"]}
    found = dict(ablations.run_all(wanted, pieces=1, jobs=2))
    assert "lora_rank" in str(found["typo"])
    assert str(found["wild"]).count("start again") == 1
    assert set(found["small"]) > {"2", "4", "8", "divergence"}


def end(name: str, changes: list[str], pieces: int) -> dict[str, Any]:
    """Instead of a run, in a process of its own."""
    if name == "killed":  # as the system does when memory is short
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "full":
        raise RuntimeError("out of memory")
    return {"pieces": pieces}


def test_one_that_is_killed_leaves_the_others_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "run", end)
    names = ["killed", "full", "one", "other"]
    found = dict(ablations.run_all(dict.fromkeys(names, []), pieces=7, jobs=2))
    assert isinstance(found["killed"], BrokenExecutor)
    assert "out of memory" in str(found["full"])
    assert found["one"] == found["other"] == {"pieces": 7}
