"""Variants that look at where tokens stand in a text: sinks, decide-later, positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cachefold import DMC, fold
from cachefold.models import attention
from cachefold.models.fold import new_cache
from tests.benchmark_scripts.tiny import logits_of, tiny_folded
from tests.models.tiny import random_ids, tiny_model
from variants import VARIANTS


@pytest.mark.parametrize("mode", ["hard", "relaxed"])
def test_sinks_stay_entries_of_their_own(mode: str) -> None:
    model, ids = tiny_folded(), random_ids(2, 30)
    for layer in model.model.layers:
        layer.self_attn.decision.bias.data.fill_(9.0)  # merges all
    plain = logits_of(model, ids, mode=mode)[1][0].alpha
    assert (plain[:, :, 1:] > 0.99).all()
    with VARIANTS["sinks"]():
        alpha = logits_of(model, ids, mode=mode)[1][0].alpha
        cache = new_cache(model)
        model(input_ids=ids, past_key_values=cache)
    assert not alpha[:, :, :5].any() and torch.equal(alpha[:, :, 5:], plain[:, :, 5:])
    # Four sinks, the ring of four, and all the others in one.
    assert all((entries == 9).all() for entries in cache.entries())


def test_sinks_of_a_padded_text_are_its_first_tokens() -> None:
    valid = torch.ones(1, 12, dtype=torch.bool)
    valid[:, :3] = False
    with VARIANTS["sinks"]():
        alpha = attention.constrain(torch.ones(1, 1, 12), valid)
    assert alpha.flatten().tolist() == [0.0] * 8 + [1.0] * 4


@pytest.mark.parametrize("delay", [0, 4])
def test_later_decisions_come_from_later_tokens(delay: int) -> None:
    model, ids = tiny_folded(delay), random_ids(2, 30)
    plain = logits_of(model, ids)[1][0].logits  # of the first layer, whose input does not change
    with VARIANTS["decide-later"]():
        late = logits_of(model, ids)[1][0]
        short = logits_of(model, ids[:, :3])[1][0].logits
    assert torch.equal(late.logits[..., : 30 - delay], plain[..., delay:])
    assert torch.equal(late.hard().alpha[..., 1:], late.alpha[..., 1:])
    assert torch.equal(short, plain[..., :3] if not delay else plain[..., [2, 2, 2]])


@pytest.mark.parametrize("mode", ["hard", "relaxed"])
def test_later_decisions_look_at_nothing_that_has_not_come(mode: str) -> None:
    model, ids = tiny_folded(), random_ids(1, 40)
    changed = ids.clone()
    changed[:, 25:] = random_ids(1, 15, seed=7)
    with VARIANTS["decide-later"]():
        before, after = (logits_of(model, x, mode=mode)[0] for x in (ids, changed))
    torch.testing.assert_close(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-3)


def places_of(name: str, alpha: Tensor, omega: Tensor) -> Tensor:
    """(T,) where the running entries of one head stand, one by one."""
    places: list[float] = []
    start = 0
    for token in range(len(alpha)):
        start = start if alpha[token] else token
        tokens = torch.arange(start, token + 1)
        weights = omega[tokens] / omega[tokens].sum()
        places.append(start if name == "first-position" else (weights * tokens).sum().item())
    return torch.tensor(places)


@pytest.mark.parametrize("name", ["first-position", "mean-position"])
def test_entries_stand_where_they_are_put(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = tiny_folded(), random_ids(1, 30), []
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda call: calls.append(call) or choose(call))
    recorder = logits_of(model, ids)[1]
    plain = calls[0].merged_key  # of the first layer, whose input does not change
    with VARIANTS[name]():
        logits_of(model, ids)
    found, decided = calls[len(model.model.layers)].merged_key, recorder[0]
    angles = model.model.rotary_emb.inv_freq
    moved = 0
    for head in range(2):
        places = places_of(name, decided.alpha[0, head], decided.omega[0, head])
        for token, place in enumerate(places.tolist()):
            pairs = torch.complex(*plain[0, head, token].chunk(2))
            turned = pairs * torch.exp(1j * (place - token) * angles)
            wanted = torch.cat([turned.real, turned.imag])
            torch.testing.assert_close(found[0, head, token], wanted, atol=1e-4, rtol=1e-4)
            moved += not torch.allclose(found[0, head, token], plain[0, head, token], atol=1e-2)
    assert moved > 10


@pytest.mark.parametrize("name", ["first-position", "mean-position", "decide-later", "sinks"])
@pytest.mark.parametrize("start", [3, 20])
def test_variants_of_whole_texts_refuse_to_go_on(name: str, start: int) -> None:
    model = tiny_folded()
    with VARIANTS[name]():
        cache = model(random_ids(1, start)).past_key_values
        with pytest.raises(ValueError, match="whole texts"):
            model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["first-position", "mean-position"])
def test_positions_need_plain_rotary_embeddings(name: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    model = fold(tiny_model(rope_parameters=rope), DMC())
    with VARIANTS[name](), pytest.raises(ValueError, match="plain rotary"):
        model(random_ids(1, 20))
