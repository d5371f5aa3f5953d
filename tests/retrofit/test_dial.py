"""Retrofits of a dial, and those that start from an artefact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cachefold.core.dial import nominal_position
from cachefold.models.dial import turn_dial
from cachefold.models.hub import load_folded, read_config, save_folded, update_config
from cachefold.policies.decisions import SPARED
from cachefold.retrofit.config import from_dict
from cachefold.retrofit.data import preset_texts
from cachefold.retrofit.prepare import load_model, prepare
from cachefold.retrofit.run import run_retrofit
from cachefold.retrofit.schedule import RetrofitSchedule
from cachefold.zoo import load_base
from tests.models.tiny import forbid_loading
from tests.retrofit.tiny import WORDS, make_tokenizer, recipe

DIAL = {"name": "dmc", "cr": 2, "max_cr": 6, "delay": 4}


@pytest.fixture(scope="module")
def fixed(workspace: Path) -> Path:
    """An artefact for cr 2."""
    return Path(run_retrofit(from_dict(recipe(workspace, "fixed", 30)))["folder"])


def dial_recipe(workspace: Path, output: str, init: Path | None, steps: int = 60, **train) -> dict:
    values = recipe(workspace, output, steps, **train)
    values["policy"] = dict(DIAL)
    values["init"] = None if init is None else str(init)
    return values


def test_a_run_starts_from_the_weights_of_an_artefact(workspace: Path, fixed: Path) -> None:
    config = from_dict(dial_recipe(workspace, "unused", fixed))
    model, _ = load_model(config)
    prepare(model, config)
    with torch.no_grad():
        found = dict(model.named_parameters())
        kept = load_folded(fixed, load_base(str(workspace / "model"), torch.float32)[0])
        for name, parameter in kept.named_parameters():
            assert torch.equal(found[name], parameter), name
    assert all(found[name].gt(0).all() for name in found if name.endswith("decision.slope"))


def test_a_dial_goes_on_as_the_single_ratio_it_stood_at(workspace: Path, tmp_path: Path) -> None:
    with_dial = from_dict(dial_recipe(workspace, "unused", None))
    model, _ = load_model(with_dial)
    prepare(model, with_dial)
    decisions = [layer.self_attn.decision for layer in model.model.layers]
    for one in decisions:
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter)
    turn_dial(model, {"bulk": [(1.5, -1.0), (3.0, 2.0)]})
    base = {"id": str(workspace / "model"), "revision": "any"}
    folder = save_folded(model, tmp_path / "dial", base=base)
    values = dial_recipe(workspace, "unused", folder)
    values["policy"] = {"name": "dmc", "cr": 3, "delay": 4}
    single, _ = load_model(from_dict(values))
    prepare(single, from_dict(values))
    states = torch.randn(1, 5, model.config.hidden_size)
    for one, layer in zip(decisions, single.model.layers, strict=True):
        assert layer.self_attn.decision.slope is None
        for found, wanted in zip(
            layer.self_attn.decision(None, None, states), one(None, None, states, 2.0), strict=True
        ):
            torch.testing.assert_close(found, wanted)
    values["policy"]["cr"] = 7
    with pytest.raises(ValueError, match="a dial for ratios up to 6; the recipe asks for 7"):
        prepare(load_model(from_dict(values))[0], from_dict(values))


@pytest.fixture(scope="module")
def pooled(workspace: Path) -> Path:
    """An artefact of one kv head for two."""
    values = recipe(workspace, "pooled", 10) | {"policy": {"name": "gqa", "kv_heads": 1}}
    return Path(run_retrofit(from_dict(values))["folder"])


def test_merging_starts_from_heads_that_were_pooled(workspace: Path, pooled: Path) -> None:
    values = dial_recipe(workspace, "unused", pooled)
    values["policy"] |= {"kv_heads": 1, "proportional": True}
    model, _ = load_model(from_dict(values))
    prepare(model, from_dict(values))
    found, decisions = dict(model.named_parameters()), 0
    kept = load_folded(pooled, load_base(str(workspace / "model"), torch.float32)[0])
    kept = dict(kept.named_parameters())
    for name, parameter in found.items():
        decisions += name not in kept
        assert ".decision." in name if name not in kept else torch.equal(parameter, kept[name])
    assert decisions == 2 * 4  # weight, bias, slope and growth of each layer
    assert len(kept) + decisions == len(found)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_other_heads_than_were_pooled_are_refused(
    workspace: Path, pooled: Path, kv_heads: int | None
) -> None:
    values = dial_recipe(workspace, "refused", pooled)
    values["policy"]["kv_heads"] = kv_heads
    with pytest.raises(ValueError, match="policy gqa with kv_heads 1 .* asks for .* policy dmc"):
        run_retrofit(from_dict(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"name": "dms", "cr": 2, "delay": 4}}, "asks for .*dms"),
        ({"train": {"lora_rank": 4}}, "LoRA rank 8"),
        ({"init": "nowhere"}, "init: nowhere is no cachefold artefact.*`cachefold ls artefacts`"),
    ],
)
def test_an_artefact_of_another_kind_is_refused_before_a_model_is_loaded(
    workspace: Path, fixed: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    forbid_loading(monkeypatch)
    values = dial_recipe(workspace, "refused", fixed)
    for key, value in change.items():
        values[key] = {**values[key], **value} if key == "train" else value
    with pytest.raises(ValueError, match=message):
        run_retrofit(from_dict(values))
    assert not (workspace / "refused").exists()


def test_targets_of_a_dial_fill_a_range_that_grows() -> None:
    values = {"model": "m", "output_dir": "o", "policy": DIAL, "train": {"ramp_from": 2}}
    schedule = RetrofitSchedule.of(from_dict(values))
    early = [schedule.target(step) for step in range(20)]
    late = [schedule.target(step) for step in range(700, 760)]
    assert 1.5 <= min(early) and max(early) < 2.2
    assert min(late) < 1.6 and max(late) > 5.7
    fixed = RetrofitSchedule.of(from_dict({**values, "policy": {"name": "dmc", "cr": 4}}))
    assert fixed.target(0) == 2 and fixed.target(897) == 4


def test_a_dial_is_trained_calibrated_and_saved(workspace: Path, fixed: Path) -> None:
    values = dial_recipe(workspace, "dial", fixed, ramp_from=2, ramp_fraction=0.3)
    rows = [{"text": " ".join(WORDS) * 40, "kind": kind} for kind in ("chat", "books", "code")]
    text = workspace / "kinds.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["files"].append(str(text))
    folder = Path(run_retrofit(from_dict(values))["folder"])
    config = read_config(folder)
    assert set(config["dial"]) == {"bulk", "chat", "code"}
    for table in config["dial"].values():
        assert table == sorted(table) and len(table) >= 2
    model = load_folded(folder, load_base(str(workspace / "model"), torch.float32)[0], cr=3)
    assert model.config.cachefold["cr"] == 3
    update_config(folder, {"dial": config["dial"] | {"legal": [[1.5, 0.0], [2.5, 1.0]]}})
    run_retrofit(from_dict(values), resume=True)  # is finished, and a preset is the user's
    again = read_config(folder)["dial"]
    assert again == config["dial"] | {"legal": [[1.5, 0.0], [2.5, 1.0]]}


def test_weights_of_sizes_start_at_one_and_are_trained(workspace: Path, fixed: Path) -> None:
    values = dial_recipe(workspace, "proportional", fixed, 30)
    values["policy"]["proportional"] = True
    fresh, _ = load_model(from_dict(values))
    prepare(fresh, from_dict(values))
    before = _size_weights(fresh)
    folder = Path(run_retrofit(from_dict(values))["folder"])
    after = _size_weights(load_folded(folder, load_base(str(workspace / "model"))[0], cr=3))
    assert before and all(weight.eq(1).all() for weight in before)
    assert not any(weight.eq(1).any() for weight in after)
    assert read_config(folder)["policy"]["proportional"] is True


@pytest.mark.parametrize("name", ["dmc", "dms"])
def test_heads_that_are_spared_merge_later_and_are_left_alone(workspace: Path, name: str) -> None:
    values = dial_recipe(workspace, f"spared-{name}", None, 20, spare=[[1, 0]])
    values["policy"]["name"] = name
    fresh, _ = load_model(from_dict(values))
    prepare(fresh, from_dict(values))
    folder = Path(run_retrofit(from_dict(values))["folder"])
    trained = load_folded(folder, load_base(str(workspace / "model"))[0])
    start, end = _decisions(fresh), _decisions(trained)
    slope, top = start["slope"][0, 0], nominal_position(DIAL["max_cr"])
    for cr, behind in ((2, SPARED * top), (4, SPARED * (top - nominal_position(4))), (6, 0.0)):
        merge = start["bias"] + start["slope"] * nominal_position(cr)
        late = (merge[0, 0] - merge) / slope
        assert torch.allclose(late, torch.tensor([[0.0, 0.0], [behind, 0.0]]), atol=1e-5)
    for part in start:
        same = (
            (start[part] == end[part]).flatten(2).all(-1)
            if part == "weight"
            else (start[part] == end[part])
        )
        assert same.tolist() == [[False, False], [True, False]], part


def _decisions(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Merge rows of weight, bias and slope, (layers, kv heads, ...) each."""
    decisions = [layer.self_attn.decision for layer in model.model.layers]
    return {
        part: torch.stack([getattr(one, part).detach().float()[:2] for one in decisions])
        for part in ("weight", "bias", "slope")
    }


@pytest.mark.parametrize(
    ("spare", "message"),
    [
        ([[2, 0]], "layer 2 does not fold; those that do: 0 to 1"),
        ([[1, 2]], "layer 1 has kv heads 0 to 1, got 2"),
        ([[1]], r"pairs, both from 0; got \[1\]"),
        ([[0, -1]], r"pairs, both from 0; got \[0, -1\]"),
        ([[1, 0], [0, 0], [1, 0]], r"names \[1, 0\] twice"),
    ],
)
def test_heads_that_are_not_there_are_refused(workspace: Path, spare: list, message: str) -> None:
    values = dial_recipe(workspace, "refused", None, spare=spare)
    with pytest.raises(ValueError, match=message):
        run_retrofit(from_dict(values))
    assert not (workspace / "refused").exists()


def test_heads_that_share_a_decision_are_not_spared() -> None:
    values = {"model": "m", "output_dir": "o", "policy": {"name": "dmc-c"}}
    with pytest.raises(ValueError, match="spare is for heads that decide alone"):
        from_dict({**values, "train": {"spare": [[0, 0]]}})


def _size_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.self_attn.decision.size_weight.detach() for layer in model.model.layers]


def test_rows_without_a_kind_are_bulk(workspace: Path) -> None:
    data = from_dict(recipe(workspace)).data
    texts = preset_texts(data, make_tokenizer())
    assert list(texts) == ["bulk"] and texts["bulk"].shape[1] == 1024


def test_a_kind_with_too_little_text_is_left_out(workspace: Path) -> None:
    values = recipe(workspace)
    short = workspace / "short.jsonl"
    short.write_text(json.dumps({"text": "a word", "kind": "chat"}) + "\n")
    values["data"]["files"].append(str(short))
    assert list(preset_texts(from_dict(values).data, make_tokenizer())) == ["bulk"]
    values["data"]["files"] = [str(short)]
    with pytest.raises(ValueError, match="takes a text of 1024 tokens"):
        preset_texts(from_dict(values).data, make_tokenizer())


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError])
def test_a_dial_that_cannot_be_calibrated_is_saved_all_the_same(
    kind: type[Exception],
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise kind("the ratio doesn't rise")

    monkeypatch.setattr("cachefold.retrofit.run.calibrate", refuse)
    values = dial_recipe(workspace, f"uncalibrated-{kind.__name__}", None, 10)
    folder = Path(run_retrofit(from_dict(values))["folder"])
    assert "dial" not in read_config(folder) and "not calibrated" in capsys.readouterr().out
