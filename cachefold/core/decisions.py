"""Append/merge decisions: from logits to `alpha` and `omega`, relaxed for training or hard.

Legend: B batch, T tokens, K kv heads. `alpha` is 1 for merge and 0 for append; `omega` > 0 is
the importance weight of a token inside its entry (Nawrot et al. 2024, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachefold.core.names import closest

RELAXATIONS = ("gumbel", "straight-through", "sigmoid")


@dataclass(frozen=True, slots=True)
class Decisions:
    """What every (token, kv head) decided.

    Attributes:
        alpha: (B, K, T) in [0, 1]; 1 merges the token into the open entry, 0 opens a new one.
        omega: (B, K, T) importance weight in (0, 1 + eps]; see the decision that made it.
        logits: (B, K, T) merge logits before relaxation; > 0 means merge at inference.
    """

    alpha: Tensor
    omega: Tensor
    logits: Tensor

    def hard(self) -> Decisions:
        """Returns the decisions taken at inference: alpha = 1 where the logit is positive.

        >>> logits = torch.tensor([[[-1.0, 2.0]]])
        >>> Decisions(torch.sigmoid(logits), torch.ones(1, 1, 2), logits).hard().alpha.tolist()
        [[[0.0, 1.0]]]
        """
        return replace(self, alpha=harden(self.logits))


def harden(logits: Tensor) -> Tensor:
    """Thresholds merge logits (any shape) to 0/1 of the same dtype: sigmoid(logit) > 1/2.

    >>> harden(torch.tensor([-0.1, 0.0, 0.1])).tolist()
    [0.0, 0.0, 1.0]
    """
    return (logits > 0).to(logits.dtype)


def relax(logits: Tensor, *, temperature: float, method: str = "gumbel") -> Tensor:
    """Samples differentiable decisions for training.

    Args:
        logits: merge logits, any shape.
        temperature: > 0; lower is closer to hard decisions.
        method: `gumbel` = sigmoid((logit + G1 - G2) / temperature) with the global torch RNG
            (Nawrot et al. 2024, section 3.1; G1 - G2 is logistic noise), `straight-through` = its
            hard value forward and its gradient backward, `sigmoid` = no noise.

    Returns:
        alpha in [0, 1], same shape and dtype.

    Raises:
        ValueError: temperature not positive, or unknown method.

    >>> relax(torch.tensor([0.0, 40.0]), temperature=0.5, method="sigmoid").tolist()
    [0.5, 1.0]
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if method not in RELAXATIONS:
        raise ValueError(
            f"unknown relaxation {method!r}.{closest(method, RELAXATIONS)} "
            f"Choose one of: {', '.join(RELAXATIONS)}."
        )
    noise = 0.0 if method == "sigmoid" else _logistic_noise(logits)
    soft = torch.sigmoid((logits + noise) / temperature)
    if method != "straight-through":
        return soft
    # The brackets make the second term exactly 0, so that the sum is exactly 0 or 1.
    return harden(soft - 0.5) + (soft - soft.detach())


def _logistic_noise(like: Tensor) -> Tensor:
    uniform = torch.rand_like(like, dtype=torch.float32).clamp_(1e-6, 1 - 1e-6)
    return torch.logit(uniform).to(like.dtype)


def constrain(alpha: Tensor, valid: Tensor) -> Tensor:
    """Sets alpha to 0 where a token has nothing to merge into.

    That is at the first token, at padding, and right after padding.

    Args:
        alpha: (B, K, T).
        valid: (B, T) bool, False at padding.

    Returns:
        (B, K, T), a new tensor.

    >>> constrain(torch.ones(1, 1, 4), torch.tensor([[False, True, True, True]])).tolist()
    [[[0.0, 0.0, 1.0, 1.0]]]
    """
    can_merge = torch.zeros_like(valid)
    can_merge[:, 1:] = valid[:, 1:] & valid[:, :-1]
    return alpha * can_merge[:, None, :].to(alpha.dtype)
