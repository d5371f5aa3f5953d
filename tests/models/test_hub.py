"""Artefacts: round trip, refusals, nothing half written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachefold import DMC, TOVA, fold, is_folded, load_folded, save_folded
from cachefold.models.hub import (
    ANY_REVISION,
    CONFIG,
    WEIGHTS,
    fits_revision,
    read_config,
)
from cachefold.models.lora import add_lora
from cachefold.models.weights import ALL_WEIGHTS
from tests.models.tiny import random_ids, scramble_decisions, tiny_model


def _trained():
    model = add_lora(fold(tiny_model(), DMC(delay=2)), 4)
    scramble_decisions(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _changed(*trainable: str):
    """A model without adapters of which decisions and these weights were trained."""
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".decision." in name or any(word in name for word in trainable))
        if parameter.requires_grad and ".decision." not in name:
            parameter.data += 0.1
    return model


def _as_of_an_older_version(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config[ALL_WEIGHTS]
    (folder / CONFIG).write_text(json.dumps(config))


def test_revisions_that_belong_together():
    assert fits_revision("a", "a") and fits_revision(ANY_REVISION, "a")
    assert not fits_revision("a", "b") and not fits_revision(None, "a")
    # Artefacts of before weights in a folder were told apart.
    assert fits_revision("local", "local") and fits_revision("local", "local:1f")
    assert fits_revision("local:1f", "local:1f") and not fits_revision("local:1f", "local:2e")
    assert not fits_revision("local", "a")


def test_round_trip(tmp_path):
    model, ids = _trained(), random_ids(1, 20)
    save_folded(model, tmp_path, base={"id": "tiny", "revision": "none"}, extra={"tokens": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cachefold.json", WEIGHTS]
    loaded = load_folded(tmp_path, tiny_model())
    with torch.no_grad():  # with gradients another backend, which rounds otherwise
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny_model()(ids).logits)
    merged = load_folded(tmp_path, tiny_model(), merge=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_bad_artefacts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no cachefold artefact"):
        load_folded(tmp_path, tiny_model())
    save_folded(_trained(), tmp_path, base={"id": "tiny", "revision": "none"})
    with pytest.raises(ValueError, match="is .*the model has"):
        load_folded(tmp_path, tiny_model(hidden_size=64))
    with pytest.raises(ValueError, match="does not fit"):
        load_folded(tmp_path, tiny_model(num_hidden_layers=3))
    (tmp_path / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(ValueError, match="can't read"):
        load_folded(tmp_path, tiny_model())
    with pytest.raises(ValueError, match="only a folded model"):
        save_folded(tiny_model(), tmp_path, base={"id": "tiny", "revision": "none"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("{broken", "cachefold.json is not valid JSON"),
        ({"format": 99}, "format 99; this version reads 1"),
        ({"base": None}, "'base' is missing"),
        ({"lora_rank": None}, "'lora_rank' is missing"),
        ({"policy": {}}, "'policy.name' is missing"),
    ],
)
def test_a_broken_config_names_file_and_key(tmp_path, change, match):
    save_folded(_trained(), tmp_path, base={"id": "tiny"})
    path = tmp_path / "cachefold.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_config(tmp_path)
    assert str(path) in str(error.value)


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path):
    save_folded(_trained(), tmp_path, base={"id": "tiny"})
    model, ids = tiny_model(hidden_size=64), random_ids(1, 9)
    before = model(ids).logits
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="the model has"):
        load_folded(tmp_path, model)
    assert not is_folded(model) and torch.equal(model(ids).logits, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_a_policy_that_learns_nothing_is_not_saved(tmp_path):
    model = fold(tiny_model(), TOVA(cr=2.0))
    with pytest.raises(ValueError, match="tova learns nothing"):
        save_folded(model, tmp_path / "a", base={"id": "tiny", "revision": "none"})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("trained", "count", "older"),
    [
        ((), 4, False),
        ((), 4, True),
        (("norm",), 9, False),  # older versions refused it on a base that is trainable
        (("",), 25, False),
        (("",), 25, True),
    ],
)
def test_an_artefact_without_adapters_loads_on_any_base(tmp_path, trained, count, older, frozen):
    model, ids = _changed(*trained), random_ids(1, 20)
    save_folded(model, tmp_path / "a", base={"id": "tiny"})
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == count
    if older:
        _as_of_an_older_version(tmp_path / "a")
    loaded = load_folded(tmp_path / "a", tiny_model().requires_grad_(not frozen))
    # Saved again, it holds the same: all its weights are frozen now.
    save_folded(loaded, tmp_path / "b", base={"id": "tiny"})
    again = load_folded(tmp_path / "b", tiny_model().requires_grad_(not frozen))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.self_attn.decision.weight"])
def test_an_artefact_that_lacks_a_weight_is_refused(tmp_path, missing, older, frozen):
    save_folded(_changed(""), tmp_path, base={"id": "tiny"})
    if older:
        _as_of_an_older_version(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    del state[missing]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"first name that differs: {missing}"):
        load_folded(tmp_path, tiny_model().requires_grad_(not frozen))
