"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cachefold.cli import VERBS
from tests.cli.conftest import Run

PROGRAM = """
import sys
from cachefold.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_no_torch(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, check=True
    )
    assert "Usage:" in done.stdout


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "cachefold", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.1.0"


def test_unknown_verb_names_the_closest(cli: Run) -> None:
    result = cli("retrofi", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown verb 'retrofi'. Did you mean 'retrofit'?")
    assert result.stdout == ""


def test_value_error_is_one_line(cli: Run, tmp_path: Path) -> None:
    result = cli("generate", "--artefact", tmp_path / "nothing", "--prompt", "w1")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "no cachefold artefact" in result.stderr and "Traceback" not in result.stderr


def test_error_of_a_file_is_one_line(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        (tmp_path / "no" / "such").read_text()

    monkeypatch.setattr("cachefold.retrofit.config.load_recipe", fail)
    (tmp_path / "x.yaml").touch()
    result = cli("retrofit", tmp_path / "x.yaml")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == f"error: {tmp_path}/no/such: No such file or directory\n"


def test_error_of_the_system_without_a_file_keeps_its_trace(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no file")

    monkeypatch.setattr("cachefold.retrofit.config.load_recipe", fail)
    (tmp_path / "x.yaml").touch()
    assert isinstance(cli("retrofit", tmp_path / "x.yaml").exception, OSError)


def test_interrupt_exits_130(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cachefold.retrofit.config.load_recipe", interrupt)
    (tmp_path / "x.yaml").touch()
    result = cli("retrofit", tmp_path / "x.yaml")
    assert result.exit_code == 130 and "Traceback" not in result.output
