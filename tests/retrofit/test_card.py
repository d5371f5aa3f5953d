"""The card and the picture of an artefact, from the files that a retrofit writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cachefold.cli import app
from cachefold.retrofit.card import CARD, CURVE, HELDOUT, card
from cachefold.retrofit.checkpoint import RECIPE

ARTEFACTS = Path(__file__).parents[2] / "artefacts"
NAMES = sorted(path.parent.name for path in ARTEFACTS.glob("*/cachefold.json"))


@pytest.fixture
def folder(tmp_path):
    """A copy of a shipped artefact without its card."""
    copy = tmp_path / "mine"
    shutil.copytree(ARTEFACTS / "smollm2-135m-cr2", copy)
    (copy / CARD).unlink(), (copy / CURVE).unlink()
    return copy


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_artefact_has_the_card_of_its_files(name):
    assert (ARTEFACTS / name / CARD).read_text() == card(ARTEFACTS / name, name)
    assert (ARTEFACTS / name / CURVE).is_file()
    recipe = yaml.safe_load((ARTEFACTS / name / RECIPE).read_text())
    assert not Path(recipe["output_dir"]).is_absolute()


def test_the_verb_writes_card_and_picture(folder):
    result = CliRunner().invoke(app, ["card", str(folder), "--name", "of-mine"])
    assert result.exit_code == 0, result.output
    text = (folder / CARD).read_text()
    assert "# of-mine" in text and f"({CURVE})" in text and (folder / CURVE).stat().st_size > 10_000
    table = json.loads((folder / HELDOUT).read_text())[0]
    assert f"**{table['mean_increase']:+.4f}**" in text


def test_without_a_table_the_card_claims_no_measurement(folder):
    (folder / HELDOUT).unlink()
    assert "Measured" not in card(folder, "mine")


def test_a_missing_log_is_named_and_nothing_is_written(folder):
    (folder / "log.jsonl").unlink()
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert result.exit_code == 2
    assert "log.jsonl" in result.stderr and not (folder / CARD).exists()


def test_a_broken_table_is_named(folder):
    (folder / HELDOUT).write_text("[")
    with pytest.raises(ValueError, match=HELDOUT):
        card(folder, "mine")
