"""The fused loss against the plain one, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cachefold.retrofit.losses import distillation_loss, hidden_loss


def naive(
    student: Tensor, teacher: Tensor, head: Tensor, labels: Tensor, kd_weight: float,
    ce_weight: float, softcap: float | None, teacher_head: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = (student @ head.T).float() if student.dtype != torch.float64 else student @ head.T
    target = teacher @ (head.detach() if teacher_head is None else teacher_head).T
    target = target.to(logits.dtype)
    if softcap:
        logits, target = (torch.tanh(x / softcap) * softcap for x in (logits, target))
    logp, logq = logits.log_softmax(-1), target.log_softmax(-1)
    kd = (logq.exp() * (logq - logp)).sum(-1).mean()
    ce = functional.nll_loss(logp, labels, ignore_index=-100)
    return kd_weight * kd + ce_weight * ce, kd, ce


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.tensor([1, 2, -100, 10, 0, 5, -100])
    return student.clone().requires_grad_(), teacher, head.requires_grad_(), labels


CASES = [(1.0, 0.0, None), (0.7, 0.3, None), (0.0, 1.0, None), (1.0, 0.5, 2.0)]


@pytest.mark.parametrize(("kd_weight", "ce_weight", "softcap"), CASES)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_the_naive_loss_and_gradient(
    kd_weight: float, ce_weight: float, softcap: float | None, chunk: int
) -> None:
    student, teacher, head, labels = inputs()
    expected = naive(student, teacher, head, labels, kd_weight, ce_weight, softcap)
    grads = torch.autograd.grad(expected[0], (student, head))
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "softcap": softcap}
    loss, kd, ce = distillation_loss(student, teacher, head, labels, chunk=chunk, **weights)
    fused = torch.autograd.grad(3 * loss, (student, head))
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(ce, expected[2].detach())
    if kd_weight:
        torch.testing.assert_close(kd, expected[1].detach())
    torch.testing.assert_close(fused, tuple(3 * grad for grad in grads))


@pytest.mark.parametrize(("kd_weight", "ce_weight", "softcap"), CASES)
def test_gradient_equals_finite_differences(
    kd_weight: float, ce_weight: float, softcap: float | None
) -> None:
    student, teacher, head, labels = inputs()
    own_head = head.detach().clone()

    def loss(student: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(
            student, teacher, head, labels, kd_weight=kd_weight, ce_weight=ce_weight,
            softcap=softcap, teacher_head=own_head, chunk=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student, head))


def test_bfloat16_is_close_and_frozen_head_gets_no_gradient() -> None:
    student, teacher, head, labels = inputs(torch.bfloat16)
    head.requires_grad_(False)
    expected = naive(student.double(), teacher.double(), head.double(), labels, 1.0, 0.5, None)
    want = torch.autograd.grad(expected[0], student)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = distillation_loss(student, teacher, head, labels, ce_weight=0.5)
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(student.grad, want, rtol=5e-2, atol=1e-2)
    assert head.grad is None


def test_same_hidden_states_have_no_divergence_and_no_label_no_cross_entropy() -> None:
    student, _, head, labels = inputs()
    nothing = torch.full_like(labels, -100)
    loss, kd, ce = distillation_loss(student, student.detach(), head, nothing, ce_weight=1.0)
    assert kd.item() == pytest.approx(0, abs=1e-12)
    assert ce.item() == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-12


def test_without_distillation_no_teacher_is_needed() -> None:
    student, teacher, head, labels = inputs()
    weights = {"kd_weight": 0.0, "ce_weight": 1.0, "softcap": 2.0}
    with_teacher, without = (
        torch.autograd.grad(distillation_loss(student, t, head, labels, **weights)[0], student)
        for t in (teacher, None)
    )
    assert torch.equal(with_teacher[0], without[0]) and without[0].any()


def test_the_distance_of_hidden_states_has_no_scale_and_moves_the_student_alone() -> None:
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    loss = hidden_loss(student, teacher)
    wanted = 2 * (student - teacher) / teacher.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], wanted)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None
    torch.testing.assert_close(hidden_loss(3 * student, 3 * teacher), loss)
    assert hidden_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
