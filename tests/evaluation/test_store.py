"""Folders of results."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from cachefold import DMC
from cachefold.evaluation import store as module
from cachefold.evaluation.store import claim, kept, refuse_other


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "new/settings.json"
    claim(path, {"limit": None, "files": ("a",), "dtype": "float32"}, "results")
    claim(path, {"limit": None, "files": ("a",), "dtype": "float32"}, "results")
    with pytest.raises(ValueError) as caught:
        claim(path, {"limit": 3, "files": ("a",), "seed": 1}, "results")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/new has results of other settings (dtype 'float32' there")
    assert "limit None there, 3 now" in text and "another folder" in text and "files" not in text


def test_results_of_a_policy_stay_when_it_gains_an_option() -> None:
    now = {"policy": DMC(cr=4, delay=8).to_dict()}
    before = {"policy": {"name": "dmc", "cr": 4, "delay": 8}}
    refuse_other("x has results", before, now)
    for other in ({"name": "dmc", "cr": 2, "delay": 8}, {"name": "gone"}, None):
        with pytest.raises(ValueError, match="of other settings"):
            refuse_other("x has results", {"policy": other}, now)


def test_results_of_another_batch_size_stay(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"batch_size": 64, "limit": 1}')  # as it was written before
    claim(path, {"limit": 1}, "results")
    with pytest.raises(ValueError, match=r"settings \(limit 1 there, 2 now\)"):
        claim(path, {"limit": 2}, "results")


def test_a_result_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "a/b.json"
    assert kept(path, lambda: {"x": 1}) == {"x": 1}
    assert kept(path, lambda: pytest.fail("measured again")) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_failure_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "a.json", lambda: {"x": 1 / 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damage_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json is damaged.*delete it"):
        kept(tmp_path / "a.json", dict)


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
