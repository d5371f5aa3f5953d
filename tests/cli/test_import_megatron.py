"""`cachefold import-megatron`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cachefold import fold
from cachefold.cli._artefact import load, open_artefact
from tests.cli.conftest import Run, words
from tests.models.megatron import write_checkpoint
from tests.models.test_megatron import POLICY, merging_model, outcome
from tests.models.tiny import tiny_model
from tests.retrofit.tiny import make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of the shape, with other weights, and a tokenizer."""
    folder = tmp_path_factory.mktemp("megatron") / "base"
    tiny_model(num_hidden_layers=4).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_imported_checkpoint_generates(cli: Run, base: Path, tmp_path: Path) -> None:
    original, out = merging_model(), tmp_path / "out"
    checkpoint = write_checkpoint(original, tmp_path / "checkpoint", tensor=2, pipeline=2)
    result = cli("import-megatron", checkpoint, "--out", out, "--hf", base)
    assert result.exit_code == 0, result.output
    assert "4 layers, iteration 2000, dmc cr 8 window 12" in result.stdout
    loaded = load(open_artefact(out, "float32"))
    assert torch.equal(outcome(loaded.model)[0], outcome(fold(original, POLICY))[0])
    assert loaded.config["imported"] == {"format": "megatron", "iteration": 2000}
    again = cli(
        "generate", "--artefact", out, "--dtype", "float32", "--prompt", words(30),
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert again.exit_code == 0 and "warning" not in again.stderr


def test_refusals_leave_no_folder(cli: Run, base: Path, tmp_path: Path) -> None:
    turned = write_checkpoint(merging_model(), tmp_path / "turned", rotary_base=500_000)
    out, checkpoint = tmp_path / "out", write_checkpoint(merging_model(), tmp_path / "c")
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=2).save_pretrained(other)
    for args, message in (
        ((checkpoint,), "the shape of no Llama 2; name the base model.*--hf"),
        ((checkpoint, "--hf", other), "num_hidden_layers 4 \\(base 2\\)"),
        ((turned, "--hf", base), "rope_parameters .*500000.0"),
        ((checkpoint, "--hf", tmp_path / "nothing"), "can't load the config of base model"),
        ((tmp_path, "--hf", base), "is no Megatron checkpoint"),
    ):
        result = cli("import-megatron", *args, "--out", out)
        assert result.exit_code == 2 and not out.exists()
        assert re.search(message, result.stderr), result.stderr
    out.mkdir()
    assert "is there already" in cli("import-megatron", checkpoint, "--out", out).stderr
