"""The shipped artefact does what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachefold import load_folded
from cachefold.evaluation.perplexity import heldout_loss
from cachefold.models.hub import read_config
from cachefold.viz import load_map
from cachefold.zoo import load_base

ROOT = Path(__file__).parent.parent
ARTEFACT = ROOT / "artefacts" / "smollm2-135m-cr2"


def test_the_recorded_measurement_holds_what_is_promised():
    (recorded,) = json.loads((ARTEFACT / "heldout.json").read_text())
    assert recorded["tokens"] == 1024 and len(recorded["files"]) == 6
    assert min(file["cr"] for file in recorded["files"]) >= 1.9
    assert recorded["mean_increase"] <= 0.05
    assert read_config(ARTEFACT)["tokens"] >= 400_000
    assert len(load_map(ARTEFACT)) == 30


@pytest.mark.parametrize("name", ["wikipedia"])
def test_a_piece_measured_anew_agrees(name):
    (recorded,) = json.loads((ARTEFACT / "heldout.json").read_text())
    (file,) = (file for file in recorded["files"] if file["name"] == name)
    model, tokenizer = load_base(read_config(ARTEFACT)["base"]["id"])
    load_folded(ARTEFACT, model)
    text = ROOT / "data" / "heldout" / f"{name}.jsonl.gz"
    (piece,) = heldout_loss(model, tokenizer, [text], pieces=1)
    # One piece of the recorded ones: near their mean, on any machine.
    assert piece.cr == pytest.approx(file["cr"], rel=0.1) and piece.cr >= 1.9
    assert piece.increase == pytest.approx(file["increase"], abs=0.06)
