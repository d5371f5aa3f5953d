"""An ablation is trained and measured under its variant, and what is stored says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from cachefold.core import decisions
from cachefold.models import attention

FACTS = {"mean_increase": 0.5, "files": [{"name": "chat", "increase": 0.5, "cr": 2.0}]}


@pytest.mark.parametrize("variant", [None, "sinks"])
def test_a_run_is_trained_and_measured_under_its_variant(
    variant: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    under: list[bool] = []

    def note(*_: object, **__: object) -> Any:
        under.append(attention.constrain is not decisions.constrain)
        return FACTS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "run_retrofit", note)
    monkeypatch.setattr(ablations, "measure_artefact", note)
    changes = ["train.seed=3", *([f"variant={variant}"] if variant else [])]
    found = ablations.run("any", changes, pieces=1)
    assert under == [variant is not None] * 4  # one training, three ratios
    assert found["changes"] == changes
    assert found["8"] == {"increase": 0.5, "files": {"chat": [0.5, 2.0]}}
    assert attention.constrain is decisions.constrain
    assert ablations.table({"any": found}).endswith("| any | +0.5000 | +0.5000 | +0.5000 |")
