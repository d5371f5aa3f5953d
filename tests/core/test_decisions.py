"""Relaxations, hard decisions, schedules."""

from __future__ import annotations

import pytest
import torch

from cachefold.core.accounting import count_entries, entries_kept
from cachefold.core.decisions import constrain, harden, relax
from cachefold.core.schedule import compression_loss, target_alpha


def test_gumbel_is_unbiased_at_zero_and_hardens_with_temperature():
    torch.manual_seed(0)
    logits = torch.zeros(20_000)
    assert relax(logits, temperature=0.1).mean().item() == pytest.approx(0.5, abs=0.02)
    warm, cold = (relax(logits, temperature=t) for t in (1.0, 0.01))
    assert (cold - cold.round()).abs().mean() < 0.05 < (warm - warm.round()).abs().mean()


def test_straight_through_is_hard_forward_with_the_soft_gradient():
    logits = torch.tensor([-1.0, 2.0], requires_grad=True)
    torch.manual_seed(1)
    hard = relax(logits, temperature=0.5, method="straight-through")
    many = relax(torch.randn(20_000), temperature=0.3, method="straight-through")
    assert set(hard.tolist()) | set(many.tolist()) == {0.0, 1.0}
    hard.sum().backward()
    torch.manual_seed(1)
    soft_logits = logits.detach().clone().requires_grad_()
    relax(soft_logits, temperature=0.5).sum().backward()
    torch.testing.assert_close(logits.grad, soft_logits.grad)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0, "method": "gumble"}]
)
def test_bad_relaxations_are_refused(options):
    with pytest.raises(ValueError, match="temperature|gumbel"):
        relax(torch.zeros(1), **options)


def test_a_mistyped_relaxation_gets_a_hint():
    with pytest.raises(ValueError, match="Did you mean 'straight-through'"):
        relax(torch.zeros(1), temperature=1.0, method="straight_through")


def test_the_first_token_and_padding_always_append():
    valid = torch.tensor([[True, True, True], [False, True, True]])
    alpha = constrain(torch.ones(2, 1, 3), valid)
    assert alpha[:, 0].tolist() == [[0, 1, 1], [0, 0, 1]]


def test_entries_count_ring_open_and_closed():
    alpha = harden(torch.tensor([[[-1.0, 1, 1, -1, 1, 1]]]))
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert [entries_kept(alpha, valid, delay).item() for delay in (0, 2, 16)] == [2, 4, 6]


def test_count_entries_totals_layers_heads_and_batch_without_padding():
    valid = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    alphas = [constrain(torch.ones(2, 3, 6), valid), torch.zeros(2, 1, 6)]
    # Layer 1: 3 heads keep ring 2 + 1 of both texts; layer 2: 1 head keeps all 6 + 4.
    assert count_entries(alphas, valid, 2) == (10 * 4, 3 * (3 + 3) + 10)


@pytest.mark.parametrize("delay", [0, 16])
def test_target_alpha_reaches_the_asked_ratio_with_the_ring(delay):
    tokens, cr = 1024, 4.0
    alpha = target_alpha(cr, tokens, delay)
    entries = delay + (tokens - delay) * (1 - alpha)
    assert tokens / entries == pytest.approx(cr)


def test_compression_loss_is_one_sided():
    assert compression_loss(torch.tensor([0.9, 0.7]), 0.5).item() == 0
    assert compression_loss(torch.tensor([0.1, 0.3]), 0.5).item() == pytest.approx(0.3)


def test_compression_loss_of_a_dial_has_two_sides():
    both = compression_loss(torch.tensor([0.9, 0.3]), 0.5, exact=True)
    assert both.item() == pytest.approx(0.3)
