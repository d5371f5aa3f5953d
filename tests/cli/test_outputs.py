"""Outputs that can't be written are told before anything slow is done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cachefold.cli._places import REPOSITORY
from tests.cli.conftest import Run
from tests.models.tiny import forbid_loading


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a folder is asked for; nothing may be loaded."""
    forbid_loading(monkeypatch)
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_demo(cli: Run, folder: Path, file: Path) -> None:
    words = ("--artefact", folder / "artefact", "--data", folder / "data")
    for out in (file, file / "deeper"):
        result = cli("demo", *words, "--document", "one.jsonl", "--out", out)
        refused(result, f"--out {out} can't be a folder, as {file} is a file")


def test_import_megatron(cli: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cachefold.models.megatron.read_checkpoint", lambda *args, **kwargs: pytest.fail("read")
    )
    refused(cli("import-megatron", "x", "--out", file), f"--out {file} is there already")
    out = file / "deeper"
    result = cli("import-megatron", "x", "--out", out)
    refused(result, f"--out {out} can't be a folder, as {file} is a file")


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_retrofit(cli: Run, file: Path, options: tuple[str, ...]) -> None:
    out = file / "deeper"
    result = cli("retrofit", "smollm2-135m-cr2", f"output_dir={out}", *options)
    refused(result, f"output_dir {out} can't be a folder, as {file} is a file")
    result = cli("retrofit", "smollm2-135m-cr2", f"output_dir={out}", "--dry-run", *options)
    assert result.exit_code == 2 and "can't be a folder" in result.stderr


@pytest.mark.parametrize("verb", ["card", "calibrate"])
def test_an_artefact_that_is_read_only(
    cli: Run, file: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("cachefold.retrofit.curve.draw", lambda *args: pytest.fail("drawn"))
    text = REPOSITORY / "data/heldout/textbook.jsonl.gz"
    more = (text, "--preset", "legal") if verb == "calibrate" else ()
    result = cli(verb, "smollm2-135m-dial-wide", *more)
    refused(result, "smollm2-135m-dial-wide; copy the artefact to a folder of your own first")
