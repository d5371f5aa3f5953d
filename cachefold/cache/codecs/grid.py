"""Even grids over groups of numbers: where they begin, how far apart their points are.

Legend: N pages, E entries of a page, C channels, G groups of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 32
"""Channels of a value that share a grid, the last group of a value may have fewer."""

HALF_MAX = torch.finfo(torch.float16).max
HALF_TINY = torch.finfo(torch.float16).tiny
# A grid finer than this part of its numbers would be lost in float32 sums, so that codes changed
# when entries are packed again; float16 can't place it anyway.
FINEST = 2.0**-12


@dataclass(frozen=True, slots=True)
class Grid:
    """Points `low + i * step`; float16 as they are stored, shapes that broadcast to the numbers."""

    low: Tensor
    step: Tensor

    def codes(self, numbers: Tensor, bits: int) -> Tensor:
        """The nearest points, uint8 of the shape of `numbers`.

        >>> half = torch.ones(1, dtype=torch.float16)
        >>> Grid(half, half * 0.5).codes(torch.tensor([0.0, 1.6, 9.0]), 2).tolist()
        [0, 1, 3]
        """
        codes = ((numbers.float() - self.low.float()) / self.step.float()).round_()
        return codes.clamp_(0, 2**bits - 1).to(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        """The points at `codes`, float32.

        >>> half = torch.ones(1, dtype=torch.float16)
        >>> Grid(half, half * 0.5).numbers(torch.tensor([0, 3], dtype=torch.uint8)).tolist()
        [1.0, 2.5]
        """
        return torch.addcmul(self.low.float(), codes.float(), self.step.float())


def fit(numbers: Tensor, dim: int, bits: int) -> Grid:
    """An even grid from the least to the greatest number along `dim`, which is kept as 1.

    >>> grid = fit(torch.tensor([[1.0, 4.0]]), 1, 2)
    >>> grid.low.tolist(), grid.step.tolist()
    ([[1.0]], [[1.0]])
    """
    least, most = torch.aminmax(numbers.float(), dim=dim, keepdim=True)
    return span(least, most, bits)


def span(least: Tensor, most: Tensor, bits: int) -> Grid:
    """The grid of 2**bits points from `least` to `most`, any shape, as float16 allows."""
    low = least.clamp(-HALF_MAX, HALF_MAX).half()
    finest = (low.float().abs() * FINEST).clamp(min=HALF_TINY)
    step = torch.maximum((most - low.float()) / (2**bits - 1), finest)
    return Grid(low, step.clamp(max=HALF_MAX).half())


def groups(value: Tensor) -> Tensor:
    """(N, E, C) -> (N, E, G, GROUP), the last channel repeated where the last group is short.

    >>> groups(torch.arange(40.0).expand(1, 1, 40))[0, 0, 1, 6:9].tolist()
    [38.0, 39.0, 39.0]
    """
    channels = value.shape[-1]
    missing = -channels % GROUP
    value = F.pad(value, (0, missing), mode="replicate") if missing else value
    return value.unflatten(-1, (num_groups(channels), GROUP))


def num_groups(channels: int) -> int:
    """G.

    >>> num_groups(80)
    3
    """
    return -(-channels // GROUP)


def ungroup(grouped: Tensor, channels: int) -> Tensor:
    """(N, E, G, GROUP) -> (N, E, C), as it was before `groups`."""
    return grouped.flatten(-2)[..., :channels]
