"""Log lines, their JSON, TensorBoard and the bar."""

from __future__ import annotations

import doctest
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cachefold.retrofit.config import from_dict
from cachefold.retrofit.run import run_retrofit
from tests.retrofit.tiny import recipe


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_line_and_json_name_stage_and_the_users_target(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"log_every": 1, "ramp_fraction": 0.5, "solidify_fraction": 0.3}
    run_retrofit(from_dict(recipe(workspace, "lines", 10, **train)))
    rows = rows_of(workspace / "lines")
    assert [row["stage"] for row in rows] == ["retrofit"] * 7 + ["solidify"] * 3
    assert [row["target"] for row in rows] == pytest.approx([1, 1.2, 1.4, 1.6, 1.8, *[2] * 5])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:10]] == [
        ["step", f"{row['step']}/10", row["stage"]] for row in rows
    ]
    assert lines[9].split("cr ")[1].split()[0] == f"{rows[9]['cr']:.2f}/2.00"


def test_speed_reaches_tensorboard(workspace: Path) -> None:
    run_retrofit(from_dict(recipe(workspace, "board", 4, log_every=1, tensorboard=True)))
    (file,) = (workspace / "board").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    for row in rows_of(workspace / "board"):
        for name in ("tokens_per_second", "eta", "cr", "target", "kd", "loss"):
            (event,) = [e for e in events.Scalars(f"train/{name}") if e.step == row["step"]]
            assert event.value == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    assert rows_of(workspace / "board")[0]["tokens_per_second"] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    run_retrofit(from_dict(recipe(workspace, "bar", 4, log_every=1)))
    row = rows_of(workspace / "bar")[-1]
    shown = terminal.getvalue()
    assert "step 4/4 solidify loss" in shown  # the line above the bar
    bar = [part for part in shown.splitlines() if "━" in part][-1]
    assert "step 4/4" in bar and f"loss {row['loss']:.4f}" in bar
    assert f"cr {row['cr']:.2f}/2.00" in bar and "eta 0:00:00" in bar


def test_no_bar_elsewhere(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_retrofit(from_dict(recipe(workspace, "no-bar", 2)))
    assert "━" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config", "reporting", "trainer"])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"cachefold.retrofit.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
