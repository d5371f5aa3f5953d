"""The shipped artefact does what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cachefold import load_folded
from cachefold.cli._artefact import SHIPPED
from cachefold.evaluation.perplexity import heldout_loss
from cachefold.models.hub import read_config
from cachefold.viz import load_map
from cachefold.zoo import load_base

ROOT = Path(__file__).parent.parent
ARTEFACT = ROOT / SHIPPED
MOST = {2: 0.005, 4: 0.03, 8: 0.07}
"""Largest mean increase in nats/token that is promised at a ratio."""


def tables() -> dict[float, dict[str, Any]]:
    """What was measured with 3 pieces of 1,024 tokens of a file, for each ratio asked for."""
    found = json.loads((ARTEFACT / "heldout.json").read_text())
    return {t["cr"]: t for t in found if (t["pieces"], t["tokens"]) == (3, 1024)}


def test_the_recorded_measurement_holds_what_is_promised():
    measured = tables()
    config = read_config(ARTEFACT)
    assert set(MOST) <= set(measured) and config["policy"]["cr"] in measured
    for cr, most in MOST.items():
        assert measured[cr]["tokens"] == 1024 and len(measured[cr]["files"]) == 6
        assert measured[cr]["mean_increase"] <= most
    assert config["tokens"] >= 390_000
    assert len(load_map(ARTEFACT)) == 30


def test_every_file_reaches_the_ratio_asked_for_within_a_tenth():
    for cr, table in tables().items():
        reached = {file["name"]: file["cr"] for file in table["files"]}
        assert reached == pytest.approx(dict.fromkeys(reached, cr), rel=0.1)


@pytest.mark.parametrize("name", ["wikipedia"])
def test_a_piece_measured_anew_agrees(name):
    asked = read_config(ARTEFACT)["policy"]["cr"]
    (file,) = (file for file in tables()[asked]["files"] if file["name"] == name)
    model, tokenizer = load_base(read_config(ARTEFACT)["base"]["id"])
    load_folded(ARTEFACT, model)
    text = ROOT / "data" / "heldout" / f"{name}.jsonl.gz"
    (piece,) = heldout_loss(model, tokenizer, [text], pieces=1)
    # One piece of the recorded ones: near their mean, on any machine.
    assert piece.cr == pytest.approx(file["cr"], rel=0.1)
    assert piece.increase == pytest.approx(file["increase"], abs=0.06)
