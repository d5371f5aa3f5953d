"""Variants of how tokens are merged or appended: relaxations, and what a decision looks at.

Legend: B batch, K kv heads, T tokens; `alpha` as in `core.decisions`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefold.core import decisions, merging
from cachefold.models import attention
from cachefold.models.attention import FoldedAttention
from cachefold.policies.decisions import LINEAR_SCALE, LinearDecision
from cachefold.retrofit import trainer
from variants.registry import of_whole_texts, swapped, variant

SINKS = 4
"""First tokens of a text that keep entries of their own, as in StreamingLLM."""
ROUNDS = 4
"""In which decisions that see the open entry are made."""
USUAL = 0.8
"""About the mean cosine of keys to the open entry: else its weight would be a second bias."""


def entmax_sigmoid(x: Tensor) -> Tensor:
    """First of the two numbers that 1.5-entmax makes of (x, 0): exactly 0 below -2, 1 above 2.

    ((x + u) / 4)^2 with u^2 = 8 - x^2: the threshold of Peters et al. (2019, Sparse
    sequence-to-sequence models) solved for two classes.

    >>> entmax_sigmoid(torch.tensor([-3.0, 0.0, 2.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    x = x.clamp(-2.0, 2.0)
    return 0.5 + x * torch.sqrt(8.0 - x * x) / 8.0


@variant
def entmax() -> AbstractContextManager[None]:
    """Does a relaxation that gets to exactly 0 and 1 leave less of a gap to hard decisions?

    Dynamic Context Pruning (Anagnostidis et al. 2023) has it without noise, as here with `sigmoid`.
    With the noise of `gumbel` logits near 0 get a gradient now and then, far ones none.
    """

    def relax(logits: Tensor, *, temperature: float, method: str) -> Tensor:
        assert method in ("gumbel", "sigmoid")
        noise = 0.0 if method == "sigmoid" else decisions._logistic_noise(logits)
        return entmax_sigmoid((logits + noise) / temperature)

    return swapped((attention, "relax", relax))


@variant
def hybrid() -> AbstractContextManager[None]:
    """Does it close the gap to see hard decisions half of the time, the rest staying smooth?

    Every head of a text is straight-through in a pass with probability 1/2, else soft.
    """

    def relax(logits: Tensor, *, temperature: float, method: str) -> Tensor:
        soft = decisions.relax(logits, temperature=temperature, method=method)
        hard = decisions.harden(soft - 0.5) + (soft - soft.detach())
        is_hard = torch.rand(logits.shape[:2], device=logits.device) < 0.5
        return torch.where(is_hard[..., None], hard, soft)

    return swapped((attention, "relax", relax))


@variant
def sinks() -> AbstractContextManager[None]:
    """Does it pay to keep the first 4 tokens of a text as they are (Xiao et al. 2024)?"""

    def constrain(alpha: Tensor, valid: Tensor) -> Tensor:
        # The one after them must not merge either, or the last of them were no longer exact.
        later = valid.cumsum(1) > SINKS + 1
        return decisions.constrain(alpha, valid) * later[:, None].to(alpha.dtype)

    swaps = [(owner, "constrain", constrain) for owner in (attention, trainer)]
    return swapped(of_whole_texts(FoldedAttention._alpha), *swaps)


@variant
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

    return swapped(of_whole_texts(alpha))


@variant
def state_conditioned() -> AbstractContextManager[None]:
    """Does it help to see the open entry: how like it the new key is, and how long it is?

    Each head learns two weights on its merge logits. A text is decided all at once, in rounds: the
    first sees nothing, and each other the open entries of the hard decisions before it.
    """
    build, decide = LinearDecision.__init__, LinearDecision.forward

    def init(self: Any, hidden_size: int, num_kv_heads: int, *args: Any, **kwargs: Any) -> None:
        build(self, hidden_size, num_kv_heads, *args, **kwargs)
        self.sight = nn.Parameter(torch.zeros(2, num_kv_heads))

    def forward(
        self: Any, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        logits, omega = decide(self, query, key, hidden_states, position)
        weights, merge = LINEAR_SCALE * self.sight.float()[:, None, :, None], logits
        for _ in range(ROUNDS):
            seen = _open_entry(key, decisions.harden(merge), omega)
            merge = logits + (weights * seen).sum(0)
        return merge, omega

    swaps = [(LinearDecision, "__init__", init), (LinearDecision, "forward", forward)]
    return swapped(of_whole_texts(FoldedAttention._alpha), *swaps)


@torch.no_grad()
def _open_entry(key: Tensor, alpha: Tensor, omega: Tensor) -> Tensor:
    """What each token finds before it: likeness of its key to the open entry, log of its length.

    Args:
        key: (B, K, T, D), before rotary embedding.
        alpha: (B, K, T), 0 or 1.
        omega: (B, K, T).

    Returns:
        (2, B, K, T): the cosine less `USUAL`, and the logarithm; 0 for the first token of a text.
    """
    mean, _, _ = merging.running_means(key, key[..., :1], alpha, omega)
    before = F.pad(mean, (0, 0, 1, 0))[..., :-1, :]
    length = F.pad(merging.running_sizes(alpha), (1, 0), value=1.0)[..., :-1].log()
    like = F.cosine_similarity(key.to(mean.dtype), before, dim=-1) - USUAL
    like[..., 0] = 0.0
    return torch.stack([like, length])
