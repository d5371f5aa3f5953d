"""The pooling scan of whole texts: Triton's on a GPU, else `core.merging.running_means`.

A cache that reads a prompt always takes that of core.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from cachefold.attention.dispatch import tell
from cachefold.attention.triton_backend import BACKEND
from cachefold.core import merging


def running_means(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Running entry after every token, in parallel over tokens; differentiable in all inputs.

    Args:
        key: (B, K, T, D), before rotary embedding.
        value: (B, K, T, Dv).
        alpha: (B, K, T) in [0, 1]; that of the first token has no effect.
        omega: (B, K, T) > 0.
        window: most tokens an entry averages; None = no bound.

    Returns:
        Mean keys (B, K, T, D), mean values (B, K, T, Dv) and weights z (B, K, T), in float32 (in
        float64 when `key` is).

    >>> key = torch.tensor([[[[1.0], [3.0]]]])
    >>> running_means(key, key, torch.ones(1, 1, 2), torch.ones(1, 1, 2))[0].flatten().tolist()
    [1.0, 2.0]
    """
    double = torch.float64 in (key.dtype, value.dtype, alpha.dtype, omega.dtype)
    if key.device.type == "cuda" and not double and _has_kernels():
        from cachefold.attention import triton_scan

        return triton_scan.running_means(key, value, alpha, omega, window)
    return merging.running_means(key, value, alpha, omega, window)


@functools.cache
def _has_kernels() -> bool:
    """Asked once, not in every layer."""
    there, reason = BACKEND.available()
    if not there:
        tell(logging.INFO, f"the pooling scan is plain torch: {reason}")
    return there
