"""The pooling scan of whole texts: Triton's on a GPU, else `core.merging.running_means`.

A cache that reads a prompt always takes that of core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachefold.attention.dispatch import load_backend
from cachefold.core import merging


def running_means(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`core.merging.running_means`, by the fastest scan there is for these tensors.

    >>> key = torch.tensor([[[[1.0], [3.0]]]])
    >>> running_means(key, key, torch.ones(1, 1, 2), torch.ones(1, 1, 2))[0].flatten().tolist()
    [1.0, 2.0]
    """
    double = torch.float64 in (key.dtype, value.dtype, alpha.dtype, omega.dtype)
    if key.device.type == "cuda" and not double and load_backend("triton")[0] is not None:
        from cachefold.attention import triton_scan

        return triton_scan.running_means(key, value, alpha, omega, window)
    return merging.running_means(key, value, alpha, omega, window)
