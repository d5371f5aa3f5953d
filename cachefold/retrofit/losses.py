"""Distillation and cross entropy straight from hidden states: never all the logits at once.

Legend: N tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Tokens whose logits (chunk, V) exist at a time."""


@dataclass(frozen=True, slots=True)
class _Weights:
    kd: float
    ce: float
    softcap: float | None


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    head: Tensor,
    labels: Tensor,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    softcap: float | None = None,
    teacher_head: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes kd_weight * mean KL(teacher || student) + ce_weight * mean cross entropy.

    The gradient is computed along with the loss, chunk by chunk, so neither pass holds (N, V).

    Args:
        student: (N, E) last hidden states, differentiable; its dtype is that of the products.
        teacher: (N, E) last hidden states of the original model; None with `kd_weight` 0.
        head: (V, E) output embedding, differentiable when it requires a gradient.
        labels: (N,) next tokens; -100 is left out of the cross entropy.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross entropy.
        softcap: tanh cap on the logits (Gemma 2), or None.
        teacher_head: (V, E) output embedding of the teacher where it has its own.
        chunk: tokens per chunk.

    Returns:
        loss (scalar, differentiable), and the two means without weights (scalars, detached);
        the cross entropy is 0 where no label counts.
    """
    assert teacher is not None or kd_weight == 0, "nothing to distil from"
    weights = _Weights(kd_weight, ce_weight, softcap)
    teacher_head = head if teacher_head is None else teacher_head
    if kd_weight == 0:
        teacher = None
    result = _LinearDistillation.apply(  # type: ignore[no-untyped-call]
        student, head, teacher, teacher_head.detach(), labels, weights, chunk
    )
    return result[0], result[1], result[2]


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of last hidden states, over the mean square of the teacher's.

    As in TinyBERT (Jiao et al. 2020, eq. 8), whose scale depends on the model; this one does not.

    Args:
        student: any shape, differentiable.
        teacher: the same shape.

    Returns:
        Scalar, float32 or wider.

    >>> hidden_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])).item()
    0.25
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.detach().to(wide)
    return (student - teacher).square().mean() / teacher.square().mean()


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        head: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor,
        labels: Tensor,
        weights: _Weights,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_student, needs_head = ctx.needs_input_grad[:2]
        dtype, wide = student.dtype, torch.promote_types(student.dtype, torch.float32)
        grad_student = torch.empty_like(student) if needs_student else None
        grad_head = torch.zeros_like(head, dtype=wide) if needs_head else None
        count = int((labels >= 0).sum())
        kd, ce = student.new_zeros(2, dtype=wide).unbind()
        with torch.autocast(student.device.type, enabled=False):
            cast_head, cast_teacher_head = head.to(dtype), teacher_head.to(dtype)
            for start in range(0, len(student), chunk):
                part = slice(start, start + chunk)
                kd_part, ce_part, grad = _chunk(
                    student[part] @ cast_head.T,
                    None if teacher is None else teacher[part].to(dtype) @ cast_teacher_head.T,
                    labels[part], weights, len(student), count,
                )  # fmt: skip
                kd, ce = kd + kd_part, ce + ce_part
                grad = grad.to(dtype) if needs_student or needs_head else grad
                if grad_student is not None:
                    grad_student[part] = grad @ cast_head
                if grad_head is not None:
                    grad_head += grad.T @ student[part]
        ctx.save_for_backward(grad_student, grad_head)
        ctx.head_dtype = head.dtype
        kd, ce = kd / max(len(student), 1), ce / max(count, 1)
        ctx.mark_non_differentiable(kd, ce)
        return weights.kd * kd + weights.ce * ce, kd, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        grad_student, grad_head = ctx.saved_tensors
        if grad_student is not None:
            grad_student = grad_student * grad_loss.to(grad_student.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_loss).to(ctx.head_dtype)
        return grad_student, grad_head, None, None, None, None, None


def _chunk(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    weights: _Weights,
    total: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of divergence and cross entropy, and the gradient (n, V) with respect to the logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits, cap = _cap(logits, weights.softcap), weights.softcap
    cap_gradient = None if cap is None else 1 - (logits / cap) ** 2
    log_student = torch.log_softmax(logits, -1, dtype=wide)
    counts = (labels >= 0).to(wide)
    ce = -(log_student.gather(1, labels.clamp(min=0)[:, None])[:, 0] * counts).sum()
    kd = log_student.new_zeros(())
    scale = counts * (weights.ce / max(count, 1))  # (n,)
    teacher_term = None
    if teacher_logits is not None:
        log_teacher = torch.log_softmax(_cap(teacher_logits, cap), -1, dtype=wide)
        teacher_term = log_teacher.exp()
        kd = torch.bmm(teacher_term[:, None], log_teacher.sub_(log_student)[..., None]).sum()
        teacher_term.mul_(weights.kd / total)
        scale = scale + weights.kd / total
    grad = log_student.exp_().mul_(scale[:, None])
    if teacher_term is not None:
        grad.sub_(teacher_term)
    if weights.ce:
        label_term = counts * (-weights.ce / max(count, 1))
        grad.scatter_add_(1, labels.clamp(min=0)[:, None], label_term[:, None])
    return kd, ce, grad if cap_gradient is None else grad.mul_(cap_gradient)


def _cap(logits: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return logits
    return torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap) * cap
