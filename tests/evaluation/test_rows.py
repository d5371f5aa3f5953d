"""Rows of a report from what was measured."""

from __future__ import annotations

import doctest
import math
import statistics

import pytest

from cachefold.evaluation import rows as module
from cachefold.evaluation.methods import Method
from cachefold.evaluation.rows import increase, rows

METHODS = [
    Method(name="dense", policy="dense"),
    Method(name="tova-cr2", policy="tova", cr=2.0),
    Method(name="h2o-cr2", policy="h2o", cr=2.0),
]


def heldout(losses: list[float], tokens: int = 10, entries: float = 10.0) -> dict:
    return {"losses": losses, "tokens": tokens, "entries": entries}


def parts() -> dict:
    return {
        "dense": {"heldout": {"a": heldout([1.0, 2.0]), "b": heldout([3.0, 5.0])}},
        "tova-cr2": {
            "heldout": {
                "a": heldout([1.1, 2.3], 10, 5.0), "b": heldout([3.2, 5.2], 30, 10.0),
            },
            "context": {"cache_bytes": 7}, "tasks": {"piqa": {"value": 0.5}},
            "facts": {"weights": None, "artefact": None},
        },
    }  # fmt: skip


def test_loss_ratio_and_paired_error() -> None:
    dense, tova = rows(METHODS, parts())
    assert dense["increase"] == 0 and dense["increase_error"] == 0 and dense["cr"] == 1
    assert tova["loss"] == pytest.approx(2.95) and tova["increase"] == pytest.approx(0.2)
    assert tova["cr"] == pytest.approx(40 / 15) and tova["files"]["b"]["cr"] == 3
    spread = statistics.stdev([0.1, 0.3]) / math.sqrt(2)  # file b: the same difference twice
    assert tova["files"]["a"]["increase_error"] == pytest.approx(spread)
    assert tova["increase_error"] == pytest.approx(spread / 2)
    assert tova["cache_bytes"] == 7 and tova["tasks"] == {"piqa": {"value": 0.5}}


def test_missing_parts_give_no_figures() -> None:
    found = parts()
    del found["tova-cr2"]["heldout"]["b"]
    tova = rows(METHODS, found)[1]
    assert tova["loss"] is tova["increase"] is tova["cr"] is None
    found = parts()
    del found["dense"]  # without dense there is a loss, but no increase
    [tova] = rows(METHODS, found)
    assert tova["loss"] is not None and tova["increase"] is None


def test_one_piece_has_no_error() -> None:
    found = increase({"a": [2.0]}, {"a": [1.5]})
    assert found["increase"] == 0.5 and found["increase_error"] is None


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
