"""Artefacts and recipes by path and by name: every verb means the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachefold.cli import _places
from cachefold.cli._places import find_artefact, find_recipe, list_artefacts, list_recipes
from tests.cli.conftest import Run


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {"base": {"id": str(root)}, "policy": {"name": "dmc", "cr": 2}}
        path.write_text("# Here.\n" if path.suffix == ".yaml" else json.dumps(config))


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the code, with a working folder that has some of the same names."""
    beside, here = tmp_path / "beside", tmp_path / "here"
    make(beside, *(f"artefacts/{name}/cachefold.json" for name in ("mid-cr2", "mid-cr8")))
    make(beside, "recipes/mid-cr2.yaml", "recipes/mid-cr8.yaml", "runs/old/final/cachefold.json")
    make(here, "artefacts/mid-cr2/cachefold.json", "recipes/mid-cr2.yaml")
    make(here, "runs/first/final/cachefold.json", "runs/second/cachefold.json")
    monkeypatch.setattr(_places, "REPOSITORY", beside)
    monkeypatch.chdir(here)
    return beside


def test_paths_and_names_mean_what_lies_here_before_what_lies_beside(beside: Path) -> None:
    wanted = {
        "artefacts/mid-cr2": Path("artefacts/mid-cr2"),
        "mid-cr2": Path("artefacts/mid-cr2"),
        "artefacts/mid-cr8": beside / "artefacts/mid-cr8",
        "mid-cr8": beside / "artefacts/mid-cr8",
        "runs/first/final": Path("runs/first/final"),
        "runs/first": Path("runs/first/final"),
        "first": Path("runs/first/final"),
        "second": Path("runs/second"),
        "old": beside / "runs/old/final",
        str(beside / "artefacts/mid-cr2"): beside / "artefacts/mid-cr2",
    }
    assert {word: find_artefact(Path(word)) for word in wanted} == wanted
    recipes = {
        "recipes/mid-cr2.yaml": Path("recipes/mid-cr2.yaml"),
        "mid-cr2": Path("recipes/mid-cr2.yaml"),
        "recipes/mid-cr8.yaml": beside / "recipes/mid-cr8.yaml",
        "mid-cr8": beside / "recipes/mid-cr8.yaml",
    }
    assert {word: find_recipe(Path(word)) for word in recipes} == recipes


def test_ls_shows_what_the_other_verbs_find(cli: Run, beside: Path) -> None:
    for what, found in (("artefacts", list_artefacts()), ("recipes", list_recipes())):
        lines = cli("ls", what).stdout.splitlines()
        assert [line.split()[0] for line in lines] == [str(path) for path in found.values()]
    assert list(list_artefacts().values()) == [
        Path("artefacts/mid-cr2"), beside / "artefacts/mid-cr8", Path("runs/first/final"),
        beside / "runs/old/final", Path("runs/second"),
    ]  # fmt: skip
    for name, path in list_artefacts().items():
        assert find_artefact(name) == path
    for name, path in list_recipes().items():
        assert find_recipe(name) == find_recipe(Path(name.stem)) == path


def test_a_typo_is_answered_with_the_closest(cli: Run, beside: Path) -> None:
    for word, meant in (
        ("artefacts/mid-cr22", "artefacts/mid-cr2"), ("mid-cr22", "mid-cr2"),
        ("runs/frst/final", "runs/first/final"), ("frst", "first"),
    ):  # fmt: skip
        for verb in (
            ("generate", "--prompt", "w1", "--artefact"), ("explain", "w1", "--artefact"),
            ("card",),
        ):  # fmt: skip
            result = cli(*verb, word)
            assert result.exit_code == 2 and f"Did you mean '{meant}'?" in result.stderr, verb
        assert f"Did you mean '{meant}'?" in cli("calibrate", word, "x.txt").stderr
    for verb in ("retrofit", "reproduce"):
        for word, meant in (
            ("recipes/mid-cr22.yaml", "recipes/mid-cr2.yaml"),
            ("mid-r2", "mid-cr2"),
        ):
            result = cli(verb, word)
            assert result.exit_code == 2 and f"Did you mean '{meant}'?" in result.stderr
            assert "There are: mid-cr2, mid-cr8" in result.stderr


def test_reproduce_takes_what_is_in_recipes_alone(cli: Run, beside: Path) -> None:
    Path("mine.yaml").write_text("")
    assert "`cachefold retrofit mine.yaml` trains it" in cli("reproduce", "mine.yaml").stderr
    for word in ("mid-cr2", "recipes/mid-cr2.yaml", "mid-cr8"):  # found, and empty
        for verb in ("retrofit", "reproduce"):
            assert "the recipe has no model" in cli(verb, word).stderr


def test_nothing_anywhere(
    cli: Run, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(_places, "REPOSITORY", tmp_path / "empty")
    assert "none; run this inside a clone" in cli("retrofit", "mid").stderr
    assert "no artefacts found below" in cli("ls", "artefacts").stdout
