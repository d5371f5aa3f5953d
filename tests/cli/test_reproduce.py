"""`cachefold reproduce`: recipe, run, table and what is recorded."""

from __future__ import annotations

import json
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
    (place / "artefacts" / "tiny" / "heldout.json").unlink()
    (place / "artefacts" / "tiny").rmdir()
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
    single = cli("reproduce", "tiny", "policy.max_cr=null", "--cr", "2", "--out", "runs/x").stderr
    assert "makes none: leave it out" in single
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").touch()
    assert "something else than a run" in cli("reproduce", "tiny", "--out", "taken").stderr
    file = cli("reproduce", "tiny", "--shipped", "--out", "taken/thesis.tex").stderr
    assert "is a file, a run or an artefact" in file
    assert not (place / "runs").exists()


def test_weights_that_diverge_are_told_without_a_trace(cli: Run, place: Path) -> None:
    changes = ("train.learning_rate=1e30", "train.decision_learning_rate=1e30")
    result = cli("reproduce", "tiny", *changes, *SIZE, "--out", "runs/changed")
    assert result.exit_code == 1 and "start again" in result.stderr, result.output


def test_a_table_is_kept_when_a_later_ratio_fails(
    cli: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachefold.evaluation import heldout

    def measure(folder: Path, *, cr: float, **options: object) -> dict[str, object]:
        if cr == 3:
            raise KeyboardInterrupt
        return {
            "cr": cr, "pieces": 1, "tokens": 48, "mean_increase": 0.5, "machine": "this",
        }  # fmt: skip

    monkeypatch.setattr(heldout, "measure_artefact", measure)
    assert cli("reproduce", "tiny", "--shipped", "--cr", "2,3", *SIZE).exit_code != 0
    written = (place / "runs" / "reproduce" / "tiny-shipped" / "heldout.json").read_text()
    assert [table["cr"] for table in json.loads(written)] == [2]


def test_an_unfinished_run_goes_on(cli: Run, place: Path) -> None:
    from cachefold.retrofit.config import load_recipe
    from cachefold.retrofit.run import run_retrofit

    output = place / "runs" / "reproduce" / "tiny"
    run_retrofit(load_recipe(place / "recipes" / "tiny.yaml", [f"output_dir={output}"]))
    (output / "final" / "cachefold.json").unlink()  # cut before the end
    result = cli("reproduce", "tiny", *SIZE)
    assert result.exit_code == 0, result.output
    assert "step 1/" not in result.output


def test_unknown_names_and_ratios(cli: Run, place: Path) -> None:
    result = cli("reproduce", "tny")
    assert "no recipe 'tny'" in result.stderr and "tiny" in result.stderr
    assert "at least 1" in cli("reproduce", "tiny", "--cr", "0.5").stderr
    assert not (place / "runs").exists()
