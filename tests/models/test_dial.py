"""The dial of a folded model: any ratio at inference, the same by every way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachefold import DMC, DMS, TOVA, fold
from cachefold.cache import FoldedCache
from cachefold.core.decisions import Decisions
from cachefold.core.dial import Dial, nominal_position
from cachefold.models.calibration import calibrate, reached_counts
from cachefold.models.dial import turn_dial
from cachefold.models.fold import FoldRun, new_cache, unfold
from cachefold.models.hub import load_folded, read_config, save_folded, update_config
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

TABLE = [(1.2, -2.0), (2.0, 0.0), (6.0, 2.0)]


def dialled(policy: object = None):
    model = fold(tiny_model(), policy or DMC(cr=2, max_cr=8, delay=4))
    scramble_decisions(model)
    for layer in model.model.layers:
        layer.self_attn.decision.slope.data.fill_(0.2)
    return model


def alphas(model, ids: torch.Tensor, **run) -> torch.Tensor:
    seen: dict[int, Decisions] = {}
    model(ids, use_cache=False, fold_run=FoldRun(recorder=seen, **run))
    return torch.stack([seen[layer].alpha for layer in sorted(seen)])


@pytest.mark.parametrize("policy", [DMC(cr=2, max_cr=8, delay=4), DMS(cr=2, max_cr=8, delay=4)])
def test_a_higher_position_merges_more_and_never_less(policy) -> None:
    model, ids = dialled(policy), random_ids(2, 40)
    found = [alphas(model, ids, position=p) for p in (-3.0, -1.0, 0.0, 1.0, 3.0)]
    assert all((a <= b).all() for a, b in zip(found, found[1:], strict=False))
    assert found[0].sum() < found[-1].sum()


def test_at_a_ratio_of_one_nothing_merges_whatever_the_slope() -> None:
    model, ids = dialled(), random_ids(1, 40)
    for layer in model.model.layers:
        layer.self_attn.decision.slope.data.fill_(-0.5)
    cache = new_cache(model, cr=1)
    model(ids, past_key_values=cache)
    assert cache.compression_ratio() == 1.0


@pytest.mark.parametrize("cr", [1.3, 2.0, 5.0])
def test_whole_text_token_by_token_and_generate_agree(cr: float) -> None:
    model, ids = dialled(), random_ids(1, 40)
    turn_dial(model, {"bulk": TABLE})
    expected = model(
        ids, use_cache=False, fold_run=FoldRun(position=model._cachefold_dial.position(cr))
    ).logits
    cache = new_cache(model, cr=cr)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
    assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-4)
    turn_dial(model, {"bulk": TABLE}, cr=cr)  # the ratio of the model instead of the cache
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    written = model.generate(ids, cr=cr, max_new_tokens=4, do_sample=False)
    assert written.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False).tolist()


def test_caches_of_one_model_have_ratios_of_their_own() -> None:
    model, ids = dialled(), random_ids(1, 60)
    ratios = []
    for cr in (1.2, 2.0, 8.0):
        cache = FoldedCache(model.config, folded_layers=[0, 1], delay=4, cr=cr)
        model(ids, past_key_values=cache)
        ratios.append(cache.compression_ratio())
    assert 1.0 <= ratios[0] < ratios[1] < ratios[2]


def test_presets_are_the_callers_choice() -> None:
    model, ids = dialled(), random_ids(1, 60)
    turn_dial(model, {"bulk": TABLE, "code": [(1.5, 1.0), (3.0, 3.0)]})
    kept = [new_cache(model, cr=2.0, preset=name) for name in (None, "bulk", "code")]
    for cache in kept:
        model(ids, past_key_values=cache)
    found = [cache.compression_ratio() for cache in kept]
    assert found[0] == found[1] < found[2]


def test_what_is_no_dial_refuses() -> None:
    fixed = fold(tiny_model(), DMC(cr=2))
    for options in ({"cr": 4.0}, {"preset": "code"}):
        with pytest.raises(ValueError, match="this model has none"):
            new_cache(fixed, **options)
        with pytest.raises(ValueError, match="this model has none"):
            fixed.generate(random_ids(1, 4), max_new_tokens=1, **options)
        with pytest.raises(ValueError, match="this model has none"):
            turn_dial(fixed, {}, **options)
    with pytest.raises(ValueError, match="this model has none"):
        new_cache(fold(tiny_model(), TOVA(cr=2)), cr=2.0)
    with pytest.raises(ValueError, match="this model has none"):
        cache = FoldedCache(fixed.config, folded_layers=[0, 1], cr=4.0)
        fixed(random_ids(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="no dial to calibrate"):
        calibrate(fixed, {"bulk": random_ids(1, 40)})
    model = dialled()
    for cr in (0.5, 8.1, "4"):
        with pytest.raises(ValueError, match="serves cr from 1 to 8"):
            new_cache(model, cr=cr)
    with pytest.raises(ValueError, match="unknown preset 'code'"):
        new_cache(model, preset="code")
    with pytest.raises(ValueError, match="past_key_values is given"):
        cache = new_cache(model)
        model.generate(random_ids(1, 4), cr=2.0, past_key_values=cache, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cr": 4, "max_cr": 2}, "at least cr=4"),
        ({"cr": 1, "max_cr": 1}, "above 1"),
        ({"max_cr": "8"}, "finite number"),
        ({"max_cr": 8, "decision": "neuron"}, "decision linear"),
    ],
)
def test_bad_ranges(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMC(**options)


def test_calibration_reaches_what_is_asked() -> None:
    model, texts = dialled(), random_ids(6, 200)
    tables = calibrate(model, {"bulk": texts, "code": texts[:3]})
    turn_dial(model, tables)
    for cr in (1.5, 2.5, 4.0):
        seen, kept = reached_counts(model, texts, model._cachefold_dial.position(cr))
        assert seen / kept == pytest.approx(cr, rel=0.1)
    assert list(tables) == ["bulk", "code"]


def test_a_dial_without_effect_is_told() -> None:
    model = dialled()
    for layer in model.model.layers:
        layer.self_attn.decision.slope.data.zero_()
    with pytest.raises(ValueError, match="'bulk': the ratio doesn't rise"):
        calibrate(model, {"bulk": random_ids(2, 80)})


def test_an_artefact_keeps_the_calibration(tmp_path: Path) -> None:
    model, ids = dialled(), random_ids(1, 60)
    turn_dial(model, {"bulk": TABLE})
    save_folded(model, tmp_path, base={"id": "tiny"})
    loaded = load_folded(tmp_path, tiny_model(), cr=5.0)
    assert loaded._cachefold_dial.position(2.0) == 0.0
    expected = model(ids, past_key_values=new_cache(model, cr=5.0)).logits
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
    update_config(tmp_path, {"dial": {"bulk": [(1.5, -1.0), (2.0, 1.0)]}})
    assert read_config(tmp_path)["policy"] == model.config.cachefold
    assert load_folded(tmp_path, tiny_model())._cachefold_dial.position(2.0) == 1.0
    base = tiny_model()
    with pytest.raises(ValueError, match="serves cr from 1 to 8"):
        load_folded(tmp_path, base, cr=9.0)
    assert not hasattr(base, "_cachefold_dial")
    assert not hasattr(unfold(loaded), "_cachefold_dial")


def test_calibrating_another_kind_of_text_leaves_the_usual_one_as_it_was() -> None:
    dial = Dial({"legal": [(1.5, -1.0), (6.0, 1.0)]})
    assert dial.position(3.0) == nominal_position(3.0) != dial.position(3.0, "legal")
