"""A tiny artefact with text, and a runner for the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cachefold.cli import app
from cachefold.models.fold import fold
from cachefold.models.hub import save_folded
from cachefold.models.lora import add_lora
from cachefold.policies import DMC
from tests.models.tiny import scramble_decisions, tiny_model
from tests.retrofit.tiny import WORDS, make_tokenizer

Run = Callable[..., Any]


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `artefact/` and `data/` with two files."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_model(eos_token_id=0, bos_token_id=None)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    add_lora(fold(model, DMC(cr=2, delay=4)), 2)
    scramble_decisions(model)
    save_folded(model, folder / "artefact", base={"id": str(folder / "base"), "revision": "main"})
    (folder / "data").mkdir()
    for seed, name in enumerate(("one", "two")):
        rows = [{"text": words(150, seed)}, {"messages": [{"role": "user", "content": words(40)}]}]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def cli() -> Run:
    """Runs one command line and gives its result."""
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])
