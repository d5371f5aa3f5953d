"""Other ways to train and merge than the library has, for the length of a `with` block.

The library keeps what earned its place, so these are swaps of its functions, for ablations.py. One
must be there in training and in measuring: its artefacts look like all others, but depend on it.

Legend: B batch, K kv heads, T tokens, D head dim; `alpha`, `omega` as in `core.decisions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cachefold.attention import pooling
from cachefold.cache import layers
from cachefold.core import decisions, merging
from cachefold.core.rotary import rotate
from cachefold.models import attention
from cachefold.models.attention import FoldedAttention
from cachefold.policies.dmc import DMC
from cachefold.retrofit import losses, trainer
from cachefold.retrofit.trainer import RetrofitTrainer

SINKS = 4
"""First tokens of a text that keep entries of their own, as in StreamingLLM."""
PREFIX = "variant="
Variant: TypeAlias = Callable[[], AbstractContextManager[None]]
VARIANTS: dict[str, Variant] = {}


def split(changes: Sequence[str]) -> tuple[list[str], str | None]:
    """Parts the changes of an ablation into overrides of the recipe and the name of a variant.

    Raises:
        ValueError: no such variant.

    >>> split(["train.lora_rank=4", "variant=frozen"])
    (['train.lora_rank=4'], 'frozen')
    """
    overrides = [change for change in changes if not change.startswith(PREFIX)]
    names = [change.removeprefix(PREFIX) for change in changes if change.startswith(PREFIX)]
    if len(names) > 1 or not set(names) <= set(VARIANTS):
        raise ValueError(f"one of {', '.join(VARIANTS)} can be a variant; got {names}")
    return overrides, names[0] if names else None


def _variant(make: Variant) -> Variant:
    VARIANTS[make.__name__.replace("_", "-")] = make
    return make


@contextmanager
def _swapped(*swaps: tuple[Any, str, Any]) -> Iterator[None]:
    """Puts (module or class, name, new function) in place until the block ends."""
    with ExitStack() as stack:
        for owner, name, new in swaps:
            stack.enter_context(patch.object(owner, name, new))
        yield


@_variant
def frozen() -> AbstractContextManager[None]:
    """Does it take adapters, or can a model as it is live with decisions that are learned?"""
    return _base_held(1.0)


@_variant
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

    return _swapped((RetrofitTrainer, "training_step", training_step))


@_variant
def reverse_kl() -> AbstractContextManager[None]:
    """Is KL(student || teacher) better, as in MiniLLM (Gu et al. 2024) and the code of DMS?"""
    return _swapped((losses, "_chunk", _with_reverse(1.0)))


@_variant
def jeffreys() -> AbstractContextManager[None]:
    """Is the mean of both divergences better than either?"""
    return _swapped((losses, "_chunk", _with_reverse(0.5)))


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


def entmax_sigmoid(x: Tensor) -> Tensor:
    """First of the two numbers that 1.5-entmax makes of (x, 0): exactly 0 below -2, 1 above 2.

    ((x + u) / 4)^2 with u^2 = 8 - x^2: the threshold of Peters et al. (2019, Sparse
    sequence-to-sequence models) solved for two classes.

    >>> entmax_sigmoid(torch.tensor([-3.0, 0.0, 2.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    x = x.clamp(-2.0, 2.0)
    return 0.5 + x * torch.sqrt(8.0 - x * x) / 8.0


@_variant
def entmax() -> AbstractContextManager[None]:
    """Does a relaxation that gets to exactly 0 and 1 leave less of a gap to hard decisions?

    Dynamic Context Pruning (Anagnostidis et al. 2023) has it without noise, as here with `sigmoid`.
    With the noise of `gumbel` logits near 0 get a gradient now and then, far ones none.
    """

    def relax(logits: Tensor, *, temperature: float, method: str) -> Tensor:
        assert method in ("gumbel", "sigmoid")
        noise = 0.0 if method == "sigmoid" else decisions._logistic_noise(logits)
        return entmax_sigmoid((logits + noise) / temperature)

    return _swapped((attention, "relax", relax))


@_variant
def hybrid() -> AbstractContextManager[None]:
    """Does it close the gap to see hard decisions half of the time, the rest staying smooth?

    Every head of a text is straight-through in a pass with probability 1/2, else soft.
    """

    def relax(logits: Tensor, *, temperature: float, method: str) -> Tensor:
        soft = decisions.relax(logits, temperature=temperature, method=method)
        hard = decisions.harden(soft - 0.5) + (soft - soft.detach())
        is_hard = torch.rand(logits.shape[:2], device=logits.device) < 0.5
        return torch.where(is_hard[..., None], hard, soft)

    return _swapped((attention, "relax", relax))


@_variant
def sinks() -> AbstractContextManager[None]:
    """Does it pay to keep the first 4 tokens of a text as they are (Xiao et al. 2024)?"""

    def constrain(alpha: Tensor, valid: Tensor) -> Tensor:
        # The one after them must not merge either, or the last of them were no longer exact.
        later = valid.cumsum(1) > SINKS + 1
        return decisions.constrain(alpha, valid) * later[:, None].to(alpha.dtype)

    swaps = [(owner, "constrain", constrain) for owner in (attention, trainer)]
    return _swapped(_of_whole_texts(FoldedAttention._alpha), *swaps)


@_variant
def mean_merge() -> AbstractContextManager[None]:
    """Are the learned weights worth it, or is the plain mean of its tokens as good an entry?"""
    original = DMC.share

    def share(self: Any, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        return original(self, logits, torch.ones_like(omega))

    return _swapped((DMC, "share", share))


@_variant
def decide_later() -> AbstractContextManager[None]:
    """Does a decision get better with all the context there is when it is carried out?

    The merge logit of token t is that of the hidden state `delay` tokens later, which arrives as
    t leaves the ring. The last tokens of a text, which never leave it, take that of the last one:
    it stands for delay + 1 tokens in the mean alpha of the compression loss.
    """
    original = FoldedAttention._alpha

    def alpha(self: Any, logits: Tensor, *args: Any) -> Tensor:
        tokens = logits.shape[-1]
        later = torch.arange(tokens, device=logits.device) + self.policy.delay
        return original(self, logits[..., later.clamp(max=tokens - 1)], *args)

    return _swapped(_of_whole_texts(alpha))


def _of_whole_texts(decide: Callable[..., Tensor]) -> tuple[Any, str, Any]:
    """Swap of `_alpha` for whole texts, all that ablations.py has: caches know no variants."""

    def alpha(self: Any, *args: Any) -> Tensor:
        if args[-1] is None:
            raise ValueError("this variant reads whole texts, can't go on with a cache")
        return decide(self, *args)

    return FoldedAttention, "_alpha", alpha


@_variant
def first_position() -> AbstractContextManager[None]:
    """Is an entry better placed at its first token than at its newest?"""
    return _entries_placed(lambda alpha, omega: merging.running_sizes(alpha) - 1.0)


@_variant
def mean_position() -> AbstractContextManager[None]:
    """Is an entry better placed at the weighted mean of its tokens' positions?"""

    def back(alpha: Tensor, omega: Tensor) -> Tensor:
        places = torch.arange(alpha.shape[-1], device=alpha.device).float().expand_as(alpha)
        mean, _, _ = pooling.running_means(places[..., None], places[..., None], alpha, omega)
        return places - mean[..., 0]

    return _entries_placed(back)


def _entries_placed(back: Callable[[Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
    """Rotates entries to a place so many tokens before their newest token.

    Mean keys are turned back before they are rotated to the newest token, so that nothing else has
    to know. `back` makes (B, K, T) tokens of alpha and omega; of soft ones a soft number.
    """
    decide, angles = FoldedAttention._alpha, torch.empty(0)

    def alpha(self: Any, *args: Any) -> Tensor:
        nonlocal angles
        angles = _token_angles(self.config, self.head_dim)
        return decide(self, *args)

    def running_means(
        key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_key, mean_value, weight = pooling.running_means(key, value, alpha, omega, window)
        assert window is None, "a window bounds what counts to the place of an entry too"
        turn = -back(alpha, omega)[..., None] * angles.to(alpha.device)
        # Each head turns by numbers of its own: heads stand where requests do.
        keys, cos, sin = (x.flatten(0, 1) for x in (mean_key, turn.cos(), turn.sin()))
        return rotate(keys[:, None], cos, sin).view_as(mean_key), mean_value, weight

    return _swapped(
        _of_whole_texts(alpha),
        (attention, "running_means", running_means),
        (layers, "running_means", running_means),
    )


def _token_angles(config: Any, dim: int) -> Tensor:
    """(D,) what the rotary embedding turns by from one token to the next."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"positions of entries are for plain rotary embeddings: {rope}")
    return rope["rope_theta"] ** (-torch.arange(0, dim, 2).repeat(2) / dim)
