"""Every recipe in the repository can be read, and says what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cachefold.retrofit.config import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
CHANGES = yaml.safe_load((RECIPES / "ablations" / "changes.yaml").read_text())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load_recipe(path)
    assert config.output_dir == f"runs/{path.stem}"
    for file in [*config.data.files, config.init]:
        assert file is None or (RECIPES.parent / file).exists(), file


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_ablation_changes_one_thing(name: str) -> None:
    base = load_recipe(RECIPES / "ablations" / "base.yaml")
    config = load_recipe(RECIPES / "ablations" / "base.yaml", CHANGES[name])
    assert config.tokens_per_step * config.steps == pytest.approx(200_000, rel=0.02)
    assert (config != base) == (name != "base")
