"""`cachefold reproduce`: recipe, run, table and what is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run
from tests.retrofit.tiny import make_workspace, recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe and the artefact it is said to give."""
    make_workspace(tmp_path)
    values = recipe(tmp_path, "ignored", steps=8)
    values["policy"] |= {"max_cr": 4}
    values["train"]["save_every"] = 4
    for name in ("recipes", "artefacts/tiny"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(values))
    recorded = [
        {
            "cr": 2.0, "tokens": 48, "pieces": pieces, "mean_increase": increase, "machine": "old",
        }
        for pieces, increase in ((1, 0.1234), (12, 0.5678))
    ]  # fmt: skip
    (tmp_path / "artefacts" / "tiny" / "heldout.json").write_text(json.dumps(recorded))
    for name in ("cachefold.json", "cachefold.safetensors"):  # where nothing loads them
        (tmp_path / "artefacts" / "tiny" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SIZE = ("--pieces", 1, "--tokens", 48)


def test_it_trains_measures_and_compares(cli: Run, place: Path) -> None:
    result = cli("reproduce", "tiny", "--cr", "2,3", *SIZE)
    assert result.exit_code == 0, result.output
    assert "shipped, cr 2: mean increase +0.1234 as recorded" in result.output
    assert "0.5678" not in result.output  # of other pieces
    assert "cr 3 not compared; recorded of what is shipped: cr 2 with --pieces 1" in result.output
    folder = place / "runs" / "reproduce" / "tiny"
    tables = json.loads((folder / "final" / "heldout.json").read_text())
    assert [table["cr"] for table in tables] == [2.0, 3.0]
    assert all(len(table["files"]) == 6 for table in tables)
    before = (folder / "final" / "cachefold.json").stat().st_mtime_ns
    again = cli("reproduce", "tiny", *SIZE)  # trained already: only measured
    assert again.exit_code == 0, again.output
    assert (folder / "final" / "cachefold.json").stat().st_mtime_ns == before
    tables = json.loads((folder / "final" / "heldout.json").read_text())
    assert [table["cr"] for table in tables] == [2.0, 3.0]  # that of 2 anew, that of 3 stays
    (folder / "final").rename(place / "artefacts" / "weights")
    for file in (place / "artefacts" / "weights").iterdir():
        file.rename(place / "artefacts" / "tiny" / file.name)
    shipped = cli("reproduce", "tiny", "--shipped", *SIZE, "--out", place / "checked")
    assert shipped.exit_code == 0, shipped.output
    assert (place / "checked" / "heldout.json").is_file()


def test_machines_are_named_where_they_differ(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cachefold.cli.reproduce import _compare

    table = {"cr": 2.0, "pieces": 1, "tokens": 48, "mean_increase": 0.1}
    path = place / "artefacts" / "tiny" / "heldout.json"
    path.write_text(json.dumps([table | {"machine": "a card"}]))
    _compare(path.parent, [table | {"machine": "a processor"}])
    assert "(on a card then, on a processor now)" in capsys.readouterr().out
    _compare(path.parent, [table | {"machine": "a card"}])
    same = capsys.readouterr().out
    assert "card" not in same and "+0.1000 measured now" in same


def test_a_recipe_whose_weights_are_not_shipped(cli: Run, place: Path) -> None:
    shutil.rmtree(place / "artefacts" / "tiny")
    assert "its weights are not shipped" in cli("reproduce", "tiny", "--shipped").stderr
    result = cli("reproduce", "tiny", *SIZE)
    assert result.exit_code == 0, result.output
    assert "recorded" not in result.output


def test_a_changed_recipe(cli: Run, place: Path) -> None:
    result = cli("reproduce", "tiny", "policy.max_cr=3", *SIZE, "--cr", 3, "--out", "runs/changed")
    assert result.exit_code == 0, result.output
    assert "recorded" not in result.output
    weights = place / "runs" / "changed" / "final"
    written = (weights / "heldout.json").read_text()
    assert json.loads(written)[0]["cr"] == 3
    assert json.loads((weights / "cachefold.json").read_text())["policy"]["max_cr"] == 3
    other = cli("reproduce", "tiny", *SIZE, "--out", "runs/changed")  # finished, but another one
    assert "had another recipe" in other.stderr
    for options in (["policy.max_cr=3"], ["--shipped"]):  # neither trains nor writes in weights
        assert "--out" in cli("reproduce", "tiny", *options, *SIZE, "--out", weights).stderr
    assert (weights / "heldout.json").read_text() == written


def test_mistakes_are_told_before_anything_is_done(cli: Run, place: Path) -> None:
    change = "policy.max_cr=3"
    assert "add --out" in cli("reproduce", "tiny", change).stderr
    both = cli("reproduce", "tiny", change, "--shipped", "--out", "runs/x").stderr
    assert "leave out --shipped or policy.max_cr=3" in both
    folder = cli("reproduce", "tiny", "output_dir=runs/y", "--out", "runs/x").stderr
    assert "leave output_dir out" in folder
    assert "from 1 to 4; got --cr 2,5" in cli("reproduce", "tiny", "--cr", "2,5").stderr
    single = ("policy.max_cr=null", "--out", "runs/x", "--cr")
    for words in ("3", "2,3"):
        assert "one ratio, 2: leave --cr out" in cli("reproduce", "tiny", *single, words).stderr
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").touch()
    assert "something else than a run" in cli("reproduce", "tiny", "--out", "taken").stderr
    for words in (("--shipped",), ()):
        for out in ("taken/thesis.tex", "taken/thesis.tex/deeper"):
            told = cli("reproduce", "tiny", *words, "--out", out).stderr
            assert told.startswith(f"error: --out {out} can't be a folder, as")
    assert not (place / "runs").exists()


def test_weights_that_diverge_are_told_without_a_trace(cli: Run, place: Path) -> None:
    changes = ("train.learning_rate=1e30", "train.decision_learning_rate=1e30")
    result = cli("reproduce", "tiny", *changes, *SIZE, "--out", "runs/changed")
    assert result.exit_code == 1 and "start again" in result.stderr, result.output


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Ratios that were asked for of a measurement without a model; one of 3 is interrupted."""
    from cachefold.evaluation import heldout

    asked: list[float | None] = []

    def measure(
        folder: Path, *, cr: float | None, pieces: int, tokens: int, progress: object
    ) -> dict[str, object]:
        if cr == 3:
            raise KeyboardInterrupt
        asked.append(cr)
        size = {"cr": cr or 2.0, "pieces": pieces, "tokens": tokens}
        return size | {"mean_increase": 0.5, "machine": "this"}

    monkeypatch.setattr(heldout, "measure_artefact", measure)
    return asked


def sizes(path: Path) -> list[tuple[float, int]]:
    return [(table["cr"], table["pieces"]) for table in json.loads(path.read_text())]


def test_a_table_is_kept_when_a_later_ratio_fails(cli: Run, place: Path, measured: object) -> None:
    assert cli("reproduce", "tiny", "--shipped", "--cr", "2,3", *SIZE).exit_code != 0
    assert sizes(place / "runs" / "reproduce" / "tiny-shipped" / "heldout.json") == [(2, 1)]


def test_tables_of_other_ratios_and_sizes_stay(cli: Run, place: Path, measured: object) -> None:
    path = place / "runs" / "reproduce" / "tiny-shipped" / "heldout.json"
    for options in (["--cr", "4,2"], ["--cr", "2", "--pieces", 2], ["--cr", "1,3"], ["--cr", "2"]):
        cli("reproduce", "tiny", "--shipped", *SIZE, *options)
    assert sizes(path) == [(1, 1), (2, 1), (2, 2), (4, 1)]
    path.write_text("[")
    broken = cli("reproduce", "tiny", "--shipped", *SIZE)
    assert broken.exit_code == 2 and "can't be read" in broken.stderr and "move it" in broken.stderr


def test_tables_of_two_artefacts_never_come_together(
    cli: Run, place: Path, measured: list[float | None]
) -> None:
    shutil.copy(place / "recipes" / "tiny.yaml", place / "recipes" / "other.yaml")
    shutil.copytree(place / "artefacts" / "tiny", place / "artefacts" / "other")
    (place / "artefacts" / "other" / "cachefold.safetensors").write_text("others")
    options = ("--shipped", *SIZE, "--out", "checked")
    assert cli("reproduce", "tiny", *options).exit_code == 0
    there = (place / "checked" / "heldout.json").read_text()
    refused = cli("reproduce", "other", *options, "--cr", 4)
    assert refused.exit_code == 2 and "name another folder with --out" in refused.stderr
    (place / "artefacts" / "tiny" / "cachefold.json").write_text('{"dial": {}}')  # calibrated
    assert "calibration changed" in cli("reproduce", "tiny", *options).stderr
    assert (place / "checked" / "heldout.json").read_text() == there and measured == [None]
    (place / "artefacts" / "tiny" / "cachefold.safetensors").unlink()
    assert "no artefact that can be measured" in cli("reproduce", "tiny", "--shipped").stderr


def test_a_table_that_names_no_artefact_belongs_to_what_it_lies_beside(place: Path) -> None:
    from cachefold.cli.reproduce import _kept

    path = place / "artefacts" / "tiny" / "heldout.json"
    assert len(_kept(path, "now", beside=True)) == 2
    with pytest.raises(ValueError, match="tables of another artefact"):
        _kept(path, "now", beside=False)


def test_a_single_ratio_may_be_asked_for_by_its_number(
    cli: Run, place: Path, measured: list[float | None]
) -> None:
    path = place / "recipes" / "tiny.yaml"
    values = yaml.safe_load(path.read_text())
    del values["policy"]["max_cr"]
    path.write_text(yaml.safe_dump(values))
    for words in ("2", "2.0,2"):  # cards print the ratio that their table has
        result = cli("reproduce", "tiny", "--shipped", "--cr", words, *SIZE)
        assert result.exit_code == 0, result.output
    assert measured == [None, None]  # only a dial can be set to a ratio


def test_an_unfinished_run_goes_on(cli: Run, place: Path) -> None:
    from cachefold.retrofit.config import load_recipe
    from cachefold.retrofit.run import run_retrofit

    output = place / "runs" / "reproduce" / "tiny"
    run_retrofit(load_recipe(place / "recipes" / "tiny.yaml", [f"output_dir={output}"]))
    (output / "final" / "cachefold.json").unlink()  # cut before the end
    result = cli("reproduce", "tiny", *SIZE)
    assert result.exit_code == 0, result.output
    assert "step 1/" not in result.output


def test_a_recipe_in_a_folder_of_recipes(cli: Run, place: Path, measured: list) -> None:
    (place / "recipes" / "more").mkdir()
    shutil.copy(place / "recipes" / "tiny.yaml", place / "recipes" / "more" / "tiny.yaml")
    shutil.copy(place / "recipes" / "tiny.yaml", place / "tiny.yaml")
    shipped = cli("reproduce", "more/tiny", "--shipped", *SIZE)  # not the artefact of `tiny`
    assert shipped.exit_code == 2 and "weights are not shipped" in shipped.stderr
    elsewhere = cli("reproduce", "tiny.yaml", *SIZE)
    assert elsewhere.exit_code == 2 and "is not in recipes" in elsewhere.stderr
    assert not measured


def test_unknown_names_and_ratios(cli: Run, place: Path) -> None:
    result = cli("reproduce", "tny")
    assert "no recipe 'tny'" in result.stderr and "tiny" in result.stderr
    assert "at least 1" in cli("reproduce", "tiny", "--cr", "0.5").stderr
    assert not (place / "runs").exists()
