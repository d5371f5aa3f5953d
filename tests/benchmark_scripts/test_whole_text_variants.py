"""Variants that look at more of a text than a token: sinks, positions, attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cachefold import DMC, fold
from cachefold.models import attention
from cachefold.models.fold import new_cache
from tests.benchmark_scripts.tiny import logits_of, tiny_folded
from tests.models.tiny import random_ids, tiny_model
from variants import VARIANTS, deciding

WHOLE = (
    "first-position", "mean-position", "decide-later", "sinks", "state-conditioned",
    "attention-weights", "mlp-residual",
)  # fmt: skip


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


@pytest.mark.parametrize(
    "name", ["decide-later", "state-conditioned", "attention-weights", "mlp-residual"]
)
@pytest.mark.parametrize("mode", ["hard", "relaxed"])
def test_nothing_is_seen_that_has_not_come(name: str, mode: str) -> None:
    ids = random_ids(1, 40)
    changed = ids.clone()
    changed[:, 25:] = random_ids(1, 15, seed=7)
    with VARIANTS[name]():
        model = tiny_folded()  # its new weights are scrambled too
        before, after = (logits_of(model, x, mode=mode)[0] for x in (ids, changed))
    torch.testing.assert_close(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-3)


def test_a_decision_sees_the_open_entry_of_the_round_before() -> None:
    with VARIANTS["state-conditioned"]():
        model, ids = tiny_folded(), random_ids(1, 30)
        layer = model.model.layers[0].self_attn
        sight = layer.decision.sight.data.mul_(20)
        found = logits_of(model, ids)[1][0].logits[0]
        weights, sight[:] = 10 * sight.clone(), 0.0
        blind = logits_of(model, ids)[1][0]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    keys = layer.k_proj(hidden)[0].unflatten(-1, (2, -1)).detach()  # (T, K, D)
    rounds = [blind.logits[0]]
    for _ in range(deciding.ROUNDS):
        heads = [
            seeing(blind.logits[0, k], rounds[-1][k] > 0, blind.omega[0, k], keys[:, k], w)
            for k, w in enumerate(weights.T)
        ]
        rounds.append(torch.stack(heads))
    torch.testing.assert_close(found, rounds[-1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(rounds[0] > 0, rounds[1] > 0)
    assert not torch.equal(rounds[1] > 0, rounds[2] > 0)
    assert torch.equal(rounds[-2] > 0, rounds[-1] > 0)  # so the entries are those it makes


def seeing(logits: Tensor, merges: Tensor, omega: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Merge logits (T,) of one head that saw its open entries, token by token."""
    found, entry = logits.clone(), list[int]()
    for token in range(len(logits)):
        if entry:
            mean = (omega[entry, None] * keys[entry]).sum(0) / omega[entry].sum()
            like = torch.cosine_similarity(keys[token], mean, dim=0) - deciding.USUAL
            found[token] += weights[0] * like + weights[1] * np.log(len(entry))
        entry = [*entry, token] if merges[token] else [token]
    return found


@pytest.mark.parametrize(("delay", "sharpness"), [(0, 1.0), (4, 1.0), (4, 3000.0)])
def test_tokens_weigh_what_attention_they_got_while_exact(delay: int, sharpness: float) -> None:
    model, ids = tiny_folded(delay), random_ids(1, 30)
    for layer in model.model.layers:  # sharp scores leave some tokens with nearly nothing
        layer.self_attn.q_proj.weight.data *= sharpness
    with VARIANTS["attention-weights"]():
        omega = logits_of(model, ids)[1][0].omega[0]
    dense = tiny_model(attn_implementation="eager")
    dense.load_state_dict(model.state_dict(), strict=False)
    attention_weights = dense(ids, output_attentions=True).attentions[0][0]  # (H, T, T)
    by_head = attention_weights.unflatten(0, (2, -1)).mean(1)
    reach = max(delay, 1)
    for token in range(30 - reach):
        wanted = by_head[:, token : token + reach, token].sum(1) / reach
        torch.testing.assert_close(omega[:, token], wanted, atol=2e-6, rtol=1e-4)
    assert (omega.min() < 1e-3) == (sharpness > 1)


def test_a_network_changes_merged_entries_alone() -> None:
    ids = random_ids(1, 30)
    with VARIANTS["mlp-residual"]():
        model = tiny_folded()
        outers = [layer.self_attn.decision.change.outer.data for layer in model.model.layers]
        for outer in outers:
            outer.mul_(100)
        changed = logits_of(model, ids)[0], logits_of(model, ids, mode="append")[0]
        key, value = torch.randn(2, 1, 2, 3, outers[0].shape[-1] // 2)
        terms = key, value, torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 3), torch.ones(1, 2, 3)
        entries = torch.cat(attention.running_means(*terms)[:2], -1)
        for outer in outers:
            outer.zero_()
        means = torch.cat(attention.running_means(*terms)[:2], -1)
        fresh = logits_of(model, ids)[0]
    same = torch.isclose(entries, means).all(-1)
    assert same.tolist() == [[[True, False, True]] * 2]
    plain, appended = (logits_of(model, ids, mode=mode)[0] for mode in ("hard", "append"))
    torch.testing.assert_close(fresh, plain)
    torch.testing.assert_close(changed[1], appended)
    assert not torch.allclose(changed[0], plain, atol=1e-3)


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


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("start", [3, 20])
def test_variants_of_whole_texts_refuse_to_go_on(name: str, start: int) -> None:
    with VARIANTS[name]():
        model = tiny_folded()
        cache = model(random_ids(1, start)).past_key_values
        with pytest.raises(ValueError, match="whole texts"):
            model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["first-position", "mean-position"])
def test_positions_need_plain_rotary_embeddings(name: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    model = fold(tiny_model(rope_parameters=rope), DMC())
    with VARIANTS[name](), pytest.raises(ValueError, match="plain rotary"):
        model(random_ids(1, 20))
