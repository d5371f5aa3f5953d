"""A model becomes a method, and is afterwards what it was."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from cachefold.evaluation import methods as module
from cachefold.evaluation.methods import Method, applied
from cachefold.evaluation.subject import Subject
from cachefold.models.dial import turn_dial
from cachefold.models.fold import fold, folded_layers, is_folded
from cachefold.models.hub import file_digest, save_folded
from cachefold.models.lora import add_lora
from cachefold.policies import DMC
from tests.models.tiny import random_ids, scramble_decisions, tiny_model


@pytest.fixture(scope="module", params=["lora", "full weights"])
def artefact(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "artefact"
    if request.param == "lora":
        model = add_lora(fold(tiny_model(), DMC(cr=2, delay=4)), 2)
    else:
        model = fold(tiny_model(), DMC(cr=2, delay=4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
    scramble_decisions(model)
    return save_folded(model, folder, base={"id": "b", "revision": "r"})


def policy_of(model):
    return model.model.layers[folded_layers(model)[0]].self_attn.policy


def test_every_kind_and_back(artefact: Path) -> None:
    model = tiny_model()
    ids, names = random_ids(1, 40), [name for name, _ in model.named_parameters()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        wanted = model(ids).logits
    kinds = [
        Method(name="dense", policy="dense"),
        Method(name="tova", policy="tova", cr=4.0),
        Method(name="full", policy="full", codec="int4"),
        Method(name="dmc", policy="dmc", cr=2.0, artefact=artefact),
    ]
    for method in kinds:
        with applied(method, model), torch.no_grad():
            output = model(ids)
            assert is_folded(model) == (method.policy != "dense")
            if method.policy in ("tova", "dmc"):
                assert output.past_key_values.compression_ratio() > 1.2
        assert not is_folded(model)
        assert [name for name, _ in model.named_parameters()] == names
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), (method.name, name)
            assert parameter.requires_grad
        with torch.no_grad():
            assert torch.equal(model(ids).logits, wanted), method.name


def test_ratio_and_seed_reach_the_policy() -> None:
    model = tiny_model()
    with applied(Method(name="x", policy="random", cr=8.0), model, seed=3):
        assert (policy_of(model).cr, policy_of(model).seed) == (8.0, 3)


def test_a_failure_inside_takes_the_method_back(artefact: Path) -> None:
    model = tiny_model()
    weights = model.model.layers[0].self_attn.q_proj.weight.clone()
    for method in (Method(name="x", policy="tova", cr=2.0),
                   Method(name="y", policy="dmc", cr=2.0, artefact=artefact)):  # fmt: skip
        with pytest.raises(KeyError), applied(method, model):
            raise KeyError
        assert not is_folded(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weights)


def test_an_artefact_that_does_not_fit(artefact: Path) -> None:
    model = tiny_model(hidden_size=64)
    method = Method(name="x", policy="dmc", cr=2.0, artefact=artefact)
    with pytest.raises(ValueError, match="the model has"), applied(method, model):
        pass
    assert not is_folded(model)


def test_weights_are_part_of_a_method(artefact: Path, tmp_path: Path) -> None:
    method = Method(name="x", policy="dmc", cr=2.0, artefact=artefact)
    assert method.facts()["weights"] == file_digest(artefact / "cachefold.safetensors")
    (tmp_path / "a").write_text("one")
    one = file_digest(tmp_path / "a")
    (tmp_path / "a").write_text("two")
    assert file_digest(tmp_path / "a") != one and len(one) == 16


def test_the_position_of_the_dial_is_part_of_a_method(tmp_path: Path) -> None:
    """And of a subject: `cachefold calibrate` changes no weight."""
    model = fold(tiny_model(), DMC(cr=2, max_cr=8))
    settings = []
    for position in (0.5, 0.7):
        table = {"bulk": [(1.5, -1.0), (4.0, position)]}
        folder = save_folded(model, tmp_path / "dial", base={"id": "b"}, extra={"dial": table})
        method = Method(name="x", policy="dmc", cr=4.0, artefact=folder, dial=True)
        turn_dial(model, table, 4.0)
        assert method.facts()["position"] == position == Subject(model, None).settings()["position"]
        settings.append(method.facts()["weights"])
    assert settings[0] == settings[1]


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
