"""Recipes: precedence, types, unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefold.retrofit.config import RetrofitConfig, load_recipe

BASE = "model: m\noutput_dir: out\npolicy: {name: dmc, cr: 2}\ntrain: {tokens: 5000, seed: 3}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(BASE)
    return tmp_path / "recipe.yaml"


def test_defaults_then_recipe_then_overrides(path: Path) -> None:
    config = load_recipe(path, ["train.seed=7", "policy.cr=4", "data.files=[a.txt]"])
    assert (config.train.tokens, config.train.seed, config.train.batch_size) == (5000, 7, 1)
    assert config.build_policy().cr == 4
    assert config.data.files == ["a.txt"]


def test_yaml_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path, ["train.learning_rate=1e-3"])
    assert config.train.learning_rate == 1e-3
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.token=5", "unknown key train.token. Did you mean 'tokens'"),
        ("trian.tokens=5", "unknown key trian. Did you mean 'train'"),
        ("train.tokens=many", "train.tokens must be a int"),
        ("train.tokens=true", "train.tokens must be a int"),
        ("train.tokens=1.5", "train.tokens must be a int"),
        ("train.tensorboard=1", "train.tensorboard must be a bool"),
        ("train.temperature=hot", "train.temperature must be a float"),
        ("train.temperature=0", "train.temperature must be > 0"),
        ("train.dtype=bfloat", "Did you mean 'bfloat16'"),
        ("train.relaxation=gumble", "Did you mean 'gumbel'"),
        ("train.ramp_fraction=2", "between 0 and 1"),
        ("train.zero_out_steps=5", "only for policy.decision: neuron"),
        ("train.ramp_fraction=0.8", "must be <= 1.*got 0.8 .*0.3"),
        ("train.kd_weight=0", "both 0"),
        ("train={kd_weight: 0, ce_weight: 1, hidden_weight: 1}", "not run with train.kd_weight=0"),
        ("train.hidden_weight=-1", ">= 0"),
        ("train.lora_rank=-1", ">= 0"),
        ("policy.delya=5", "Did you mean 'delay'"),
        ("policy.name=dmx", "unknown policy 'dmx'. Did you mean 'dm"),
        ("policy.cr=0.5", ">= 1"),
        ("policy.cr=two", "must be a finite number"),
        ("data.files=a.txt", "data.files must be a list"),
        ("data.files=[1]", r"data.files\[0\] must be a str"),
        ("data.seq_len=1", "at least 2"),
        ("data.seq_len=16", "more than policy.delay.*16 and 16"),
        ("data.held_out=0", "at least 1"),
        ("train=5", "train: must be a group of keys"),
        ("model.x=5", "'model' holds one value"),
        ("train.tokens", "an override looks like"),
        ("train.tokens=[", "not valid YAML"),
    ],
)
def test_bad_values_say_what_is_wrong(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


def test_files_and_dataset_exclude_each_other(path: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        load_recipe(path, ["data.files=[a.txt]", "data.dataset=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a", "must hold key: value pairs"),
        ("model: m", "no output_dir"),
        ("", "no model"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "bad.yaml")


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set train.lora_rank: 0, got 8"),
        (["train.lora_rank=0", "train.zero_out_steps=9"], "less than the 9 steps"),
    ],
)
def test_neuron_needs_all_weights_and_steps_after_zero_out(
    path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(path, ["policy.decision=neuron", *overrides])
    load_recipe(path, ["policy.decision=neuron", "train.lora_rank=0", "train.zero_out_steps=8"])


def test_one_log_line_a_step_is_the_default(path: Path) -> None:
    assert load_recipe(path).train.log_every == 1


def test_shipped_recipes_load() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).steps > 10


def test_every_field_has_a_docstring() -> None:
    import ast
    import inspect

    from cachefold.retrofit import config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{node.name}: {ast.unparse(field)}"
    assert RetrofitConfig.__doc__
