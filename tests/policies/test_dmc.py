"""DMC: options, the numbers of its decisions, the registry."""

from __future__ import annotations

import doctest
import importlib
import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from cachefold import DMC, get_policy, list_policies
from cachefold.policies.base import register
from cachefold.policies.decisions import LinearDecision, NeuronDecision

EPS = 2.0**-7
"""Machine epsilon of bfloat16."""


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("cr", [0.5, math.nan, math.inf, "4", None, True]),
        ("delay", [-1, 1.5, "16", None, False]),
        ("window", [0, -3, 2.0, "12", True]),
        ("neuron", [1.0, "last", None, True]),
        ("decision", ["neurons", None]),
        ("per", ["heads", 1]),
        ("proportional", [1, "yes", None]),
    ],
)
def test_bad_options_are_refused_by_name(option, bad):
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{option} .*got {value!r}"):
            DMC(**{option: value})


def test_hints_name_the_closest_choice():
    with pytest.raises(ValueError, match="Did you mean 'neuron'"):
        DMC(decision="neurons")
    with pytest.raises(ValueError, match="Did you mean 'dmc"):
        get_policy("dmcc")
    with pytest.raises(ValueError, match="no option 'dealy'. Did you mean 'delay'"):
        get_policy("dmc", dealy=4)
    with pytest.raises(ValueError, match="Available: .*dmc"):
        get_policy("zzzzz")


def test_a_policy_survives_its_dict_and_is_frozen():
    policy = DMC(cr=3, delay=0, window=12, decision="neuron", per="layer", neuron=0)
    assert policy.to_dict()["name"] == "dmc" in list_policies()
    assert get_policy(**policy.to_dict()) == policy
    with pytest.raises(FrozenInstanceError):
        policy.cr = 2


@pytest.mark.parametrize("other", [{"window": 12}, {"decision": "neuron"}])
def test_proportional_refuses_what_it_cannot_go_with(other):
    with pytest.raises(ValueError, match="^proportional"):
        DMC(proportional=True, **other)


def test_a_name_is_taken_once():
    with pytest.raises(AssertionError, match="registered twice"):
        register("dmc")(DMC)


def test_a_neuron_beyond_the_head_is_refused():
    for neuron in (8, -9):
        with pytest.raises(ValueError, match="8 channels, -8 to 7"):
            DMC(decision="neuron", neuron=neuron).build_decision(32, 2, 8)
    assert DMC(decision="neuron", neuron=7).build_decision(32, 2, 8).neuron == 7


def test_neuron_numbers():
    """Offset 5, eps of bfloat16, omega of the mean over the query group (facts of the paper)."""
    query = torch.zeros(1, 4, 1, 3)
    query[0, :, 0, -1] = torch.tensor([-6.0, -2.0, 3.0, 9.0])
    key = torch.zeros(1, 2, 1, 3)
    key[0, :, 0, -1] = torch.tensor([0.0, 7.5])
    logits, omega = NeuronDecision(-1)(query, key, torch.zeros(1, 1, 8))
    assert logits.flatten().tolist() == [-5.0, 2.5]
    expected = [1 / (1 + math.exp(-(x + 5))) + EPS for x in (-4.0, 6.0)]
    assert omega.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert 1 < omega[0, 1, 0] < 1 + EPS


def test_omega_of_a_neuron_keeps_its_gradient_at_the_start():
    query = torch.zeros(1, 2, 1, 3, requires_grad=True)
    NeuronDecision(-1)(query, torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 8))[1].sum().backward()
    assert (query.grad[..., -1] > 0).all()


def test_a_linear_decision_works_in_any_dtype_and_under_autocast():
    states = torch.randn(1, 5, 8)
    decision = LinearDecision(8, 2)
    torch.nn.init.normal_(decision.weight)
    expected = decision(states, states, states)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(decision(states, states, states), expected, strict=True):
            assert torch.equal(a, b)
    logits, omega = decision.to(torch.bfloat16)(states, states, states.bfloat16())
    assert logits.dtype == omega.dtype == torch.float32
    torch.testing.assert_close(logits, expected[0], rtol=0.05, atol=0.5)


@pytest.mark.parametrize("name", ["base", "decisions", "dmc", "dms", "options"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.policies.{name}"))
    assert result.attempted and not result.failed
