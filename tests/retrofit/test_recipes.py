"""Every recipe in the repository can be read, and says what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cachefold.retrofit.config import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMOLLM, GEMMA = "smollm2-135m", "gemma3-270m"
CHANGES = yaml.safe_load((RECIPES / "ablations" / "changes.yaml").read_text())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load_recipe(path)
    assert config.output_dir == f"runs/{path.stem}"
    for file in [*config.data.files, config.init]:
        assert file is None or (RECIPES.parent / file).exists(), file


def test_a_second_architecture_has_the_recipe_of_the_first() -> None:
    first, second = (load_recipe(RECIPES / f"{name}-cr2.yaml") for name in (SMOLLM, GEMMA))
    assert (first.model, second.model) == (SMOLLM, GEMMA)
    assert replace(second, model=first.model, output_dir=first.output_dir) == first


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_ablation_changes_one_thing(name: str) -> None:
    base = load_recipe(RECIPES / "ablations" / "base.yaml")
    config = load_recipe(RECIPES / "ablations" / "base.yaml", CHANGES[name])
    assert config.tokens_per_step * config.steps == pytest.approx(200_000, rel=0.02)
    assert (config != base) == (name != "base")
