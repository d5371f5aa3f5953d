"""Schedules and the compression loss of a retrofit (Nawrot et al. 2024, section 3.2)."""

from __future__ import annotations

import math

from torch import Tensor


def target_cr(step: int, total: int, cr: float, start: float = 1.0) -> float:
    """Ramps the target compression ratio linearly from `start` to `cr` over `total` steps.

    >>> [target_cr(step, 10, 3.0) for step in (0, 5, 10, 20)]
    [1.0, 2.0, 3.0, 3.0]
    """
    return start + (cr - start) * min(1.0, step / max(total, 1))


def zero_out_factor(step: int, total: int) -> float:
    """Factor on the decision neuron during the zero-out stage: reaches 0 at 80 % of `total`.

    >>> [zero_out_factor(step, 10) for step in (0, 4, 8, 10)]
    [1.0, 0.5, 0.0, 0.0]
    """
    return max(0.0, 1.0 - step / (0.8 * max(total, 1)))


def target_alpha(cr: float, tokens: int, delay: int = 0) -> float:
    """Mean merge decision at which `tokens` tokens keep `tokens / cr` entries, ring included.

    With no delay this is the paper's 1 - 1/cr. With a delay the newest `delay` tokens stay
    exact, so the others have to merge a little more often. Capped at 0.99 where the ring alone
    is already more than the asked cache.

    Raises:
        ValueError: cr below 1.

    >>> target_alpha(2.0, 1000)
    0.5
    >>> round(target_alpha(2.0, 512, delay=16), 4)
    0.5161
    """
    if not math.isfinite(cr) or cr < 1:
        raise ValueError(f"cr is tokens seen / entries kept and must be >= 1, got {cr}")
    folded_tokens = tokens - delay
    if folded_tokens <= 0 or cr == 1:
        return 0.0
    return min(0.99, 1.0 - max(tokens / cr - delay, 0.0) / folded_tokens)


def compression_loss(mean_alpha: Tensor, target: float, *, exact: bool = False) -> Tensor:
    """One-sided loss max(0, target - mean alpha), dimensionless; or |target - mean alpha|.

    Args:
        mean_alpha: (B,) mean of alpha over layers, heads and tokens.
        target: mean alpha asked for, in [0, 1).
        exact: whether merging more than asked costs as well. A dial needs that: its low ratios
            would follow the high ones up, as distillation alone pulls them back slowly.

    Returns:
        Scalar, the mean over the batch.

    >>> import torch
    >>> round(compression_loss(torch.tensor([0.25, 0.75]), 0.5).item(), 3)
    0.125
    """
    missing = target - mean_alpha
    return (missing.abs() if exact else missing.clamp(min=0.0)).mean()
