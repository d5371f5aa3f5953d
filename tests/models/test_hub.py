"""Artefacts: round trip, refusals, nothing half written."""

from __future__ import annotations

import pytest
import torch

from cachefold import DMC, fold, load_folded, save_folded
from cachefold.models.hub import WEIGHTS, add_lora
from tests.models.tiny import random_ids, scramble_decisions, tiny_model


def _trained():
    model = add_lora(fold(tiny_model(), DMC(delay=2)), 4)
    scramble_decisions(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_round_trip(tmp_path):
    model, ids = _trained(), random_ids(1, 20)
    save_folded(model, tmp_path, base={"id": "tiny", "revision": "none"}, extra={"tokens": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cachefold.json", WEIGHTS]
    loaded = load_folded(tmp_path, tiny_model())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny_model()(ids).logits)


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
