"""Variants of what is learned and from what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cachefold.core.decisions import Decisions
from cachefold.core.schedule import compression_loss
from cachefold.models.fold import FoldRun
from cachefold.retrofit import data, losses, run, trainer
from cachefold.retrofit.config import DataConfig
from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.text import Row
from variants.registry import swapped, variant


@variant
def frozen() -> AbstractContextManager[None]:
    """Does it take adapters, or can a model as it is live with decisions that are learned?"""
    return _base_held(1.0)


@variant
def separate() -> AbstractContextManager[None]:
    """Is it better to learn what to merge first, and only then to adapt the model to it?"""
    return _base_held(0.5)


def _base_held(part: float) -> AbstractContextManager[None]:
    """Only decisions learn in the first part of the steps."""
    original = RetrofitTrainer.training_step

    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step < part * self.state.max_steps:
            for name, parameter in model.named_parameters():
                if ".decision." not in name:  # before clipping, which looks at the norm of all
                    parameter.grad = None
        return loss

    return swapped((RetrofitTrainer, "training_step", training_step))


@variant
def reverse_kl() -> AbstractContextManager[None]:
    """Is KL(student || teacher) better, as in MiniLLM (Gu et al. 2024) and the code of DMS?"""
    return swapped((losses, "_chunk", _with_reverse(1.0)))


@variant
def jeffreys() -> AbstractContextManager[None]:
    """Is the mean of both divergences better than either?"""
    return swapped((losses, "_chunk", _with_reverse(0.5)))


def _with_reverse(share: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`losses._chunk` with a share of the divergence turned round."""
    original = losses._chunk

    def chunk(
        logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, weights: Any, total: int,
        count: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rest = replace(weights, kd=weights.kd * (1 - share))
        kd, ce, grad = original(logits, teacher_logits, labels, rest, total, count)
        if teacher_logits is None:
            return kd, ce, grad
        cap = weights.softcap
        logits = losses._cap(logits, cap)
        log_student = torch.log_softmax(logits, -1, dtype=grad.dtype)
        log_teacher = torch.log_softmax(losses._cap(teacher_logits, cap), -1, dtype=grad.dtype)
        student, ratio = log_student.exp(), log_student - log_teacher
        reverse = (student * ratio).sum(-1, keepdim=True)
        # The gradient of sum p log(p / q) by the logits of p; that of log p has the mean 0.
        slope = student * (ratio - reverse) * (weights.kd * share / total)
        if cap is not None:
            slope = slope * (1 - (logits / cap) ** 2)
        return (1 - share) * kd + share * reverse.sum(), ce, grad + slope

    return chunk


@variant
def layer_targets() -> AbstractContextManager[None]:
    """Should every layer reach the ratio, rather than all layers together?"""
    return _targets_of(lambda alpha: alpha.mean((1, 2))[:, None])


@variant
def head_targets() -> AbstractContextManager[None]:
    """Should every head reach the ratio, rather than all heads together?"""
    return _targets_of(lambda alpha: alpha.mean(2))


def _targets_of(parts: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """The loss on the ratio is that of (B, parts) of the decisions (B, K, T) of each layer."""
    recorded: dict[int, Decisions] = {}
    original = RetrofitTrainer._student_run

    def student_run(self: Any, step: int, decisions: dict[int, Decisions]) -> FoldRun:
        nonlocal recorded
        recorded = decisions
        return original(self, step, decisions)

    def loss(mean_alpha: Tensor, target: float, *, exact: bool = False) -> Tensor:
        alphas = torch.cat([parts(decisions.alpha) for decisions in recorded.values()], 1)
        return compression_loss(alphas.flatten(), target, exact=exact)

    swaps = [(RetrofitTrainer, "_student_run", student_run), (trainer, "compression_loss", loss)]
    return swapped(*swaps)


@variant
def bulk_alone() -> AbstractContextManager[None]:
    """Does it take conversations and code, or is other text enough? The dial is calibrated on all.

    As many tokens of rows whose `kind` is neither.
    """
    rows, load = data._rows, data.load_blocks

    def rows_of_bulk(source: DataConfig) -> Iterator[Row]:
        return (row for row in rows(source) if row[1].get("kind") not in data.PRESETS)

    def load_blocks(source: DataConfig, tokenizer: Any) -> Tensor:
        with swapped((data, "_rows", rows_of_bulk)):
            return load(source, tokenizer)

    return swapped((run, "load_blocks", load_blocks))
