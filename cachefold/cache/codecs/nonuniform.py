"""Uneven levels and exact outliers, as KVQuant stores entries (Hooper et al., NeurIPS 2024).

Unlike the paper, nothing is calibrated: levels, scales and outliers are those of each page.

Legend: N pages, E entries of a page, C channels, L levels, X outliers of a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec, register
from cachefold.cache.codecs.grid import FINEST, HALF_MAX, HALF_TINY
from cachefold.cache.codecs.packing import Sections, as_bytes, pack, packed_size, unpack

LLOYD_STEPS = 8
TINY = torch.finfo(torch.float32).tiny
MOST_PLACES = torch.iinfo(torch.int16).max
LEVEL_UNIT = 127.0
"""Levels are stored as int8: so many units are the half width of a range."""


@dataclass(frozen=True, slots=True)
class NonUniform:
    """Levels where the numbers of a page are, and its most extreme numbers in float16.

    Keys are scaled by channel and values by entry; then 2**bits levels, found by Lloyd's
    iterations, serve all keys of the page, and others all values.

    >>> codec = NonUniform(4)
    >>> pages = torch.linspace(0, 1, 32).view(1, 32, 1)
    >>> key, _ = codec.decode(codec.encode(pages, pages), 1, 1)
    >>> bool(((key - pages).abs() < 0.05).all())
    True
    """

    bits: int
    outliers: float = 0.01
    """Share of the numbers of a page that are kept in float16."""

    @property
    def about(self) -> str:
        """One line for `cachefold ls codecs`."""
        share = f"{self.outliers:.0%} outliers in float16"
        return f"{self.bits}-bit levels fitted to each page, {share} (KVQuant)"

    @property
    def weighs(self) -> bool:
        """No."""
        return False

    def alone(self) -> tuple[Codec, Codec]:
        """The same for both."""
        return self, self

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page: levels, scales, outliers with their places, codes."""
        if PAGE * max(key_dim, value_dim) > MOST_PLACES:
            raise ValueError(
                f"heads of {max(key_dim, value_dim)} channels are too large for codec kvquant, "
                f"which counts places up to {MOST_PLACES} in a page; use int4 or int2"
            )
        return self._nbytes(key_dim, key_dim) + self._nbytes(value_dim, PAGE)

    def _nbytes(self, channels: int, scales: int) -> int:
        """Bytes of the keys, or of the values, of a page."""
        if not channels:
            return 0
        codes = packed_size(PAGE, self.bits) * channels
        return 2**self.bits + 4 * scales + 4 * self._outliers(channels) + codes

    def _outliers(self, channels: int) -> int:
        """X."""
        return math.ceil(self.outliers * PAGE * channels)

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages; see `Codec`."""
        held = None if like is None else Sections(like)
        parts: list[Tensor] = []
        for numbers, dim in ((key.float(), 1), (value.float(), 2)):
            if not numbers.shape[2]:
                continue
            if held is None:
                levels = self._fit(numbers, dim)
            else:
                levels, _, _ = self._take(held, numbers.shape[2], dim)
            parts += self._pack(numbers, levels)
        return torch.cat([as_bytes(part) for part in parts], 1)

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks pages; see `Codec`."""
        sections, found = Sections(packed), []
        for channels, dim in ((key_dim, 1), (value_dim, 2)):
            if not channels:
                found.append(torch.zeros(len(packed), PAGE, 0, device=packed.device))
                continue
            levels, kept, codes = self._take(sections, channels, dim)
            points = levels.points.float() / LEVEL_UNIT
            numbers = points.gather(1, codes.flatten(1).long()).view_as(codes)
            numbers = torch.addcmul(levels.middle.float(), numbers, levels.width.float())
            numbers.flatten(1).scatter_(1, levels.places.long(), kept.float())
            found.append(numbers)
        return found[0], found[1]

    def _fit(self, numbers: Tensor, dim: int) -> Levels:
        """Levels for (N, E, C) float32, scaled along `dim`."""
        places = _extremes(numbers, dim, self._outliers(numbers.shape[2]))
        inside = torch.ones_like(numbers, dtype=torch.bool)
        inside.flatten(1).scatter_(1, places, False)
        least = numbers.masked_fill(~inside, torch.inf).amin(dim, keepdim=True)
        most = numbers.masked_fill(~inside, -torch.inf).amax(dim, keepdim=True)
        # Where everything is an outlier there is no range.
        least, most = (x.masked_fill(least > most, 0.0) for x in (least, most))
        middle = ((least + most) / 2).clamp(-HALF_MAX, HALF_MAX).half()
        width = torch.maximum(most - middle.float(), middle.float() - least)
        width = torch.maximum(width, middle.float().abs() * FINEST).clamp(HALF_TINY, HALF_MAX)
        width = width.half()
        scaled = ((numbers - middle.float()) / width.float()).clamp(-1.0, 1.0)
        weight = (inside * width.float().square()).flatten(1)
        points = _lloyd(scaled.flatten(1), weight, 2**self.bits)
        return Levels(points, middle, width, places.to(torch.int16))

    def _pack(self, numbers: Tensor, levels: Levels) -> list[Tensor]:
        """Sections of a packed page, as `_take` reads them."""
        places = levels.places.long()
        kept = numbers.flatten(1).gather(1, places).clamp(-HALF_MAX, HALF_MAX).half()
        scaled = (numbers - levels.middle.float()) / levels.width.float()
        codes = _nearest(scaled.flatten(1), levels.points.float() / LEVEL_UNIT)
        codes = codes.scatter_(1, places, 0).view(numbers.shape).to(torch.uint8)
        codes = pack(codes.mT.contiguous(), self.bits)
        return [levels.points, levels.middle, levels.width, levels.places, kept, codes]

    def _take(self, sections: Sections, channels: int, dim: int) -> tuple[Levels, Tensor, Tensor]:
        """What `_pack` wrote: levels, outliers (N, X) and codes (N, E, C) uint8."""
        half, count = torch.float16, self._outliers(channels)
        shape = (1, channels) if dim == 1 else (PAGE, 1)
        levels = Levels(
            sections.take(torch.int8, 2**self.bits),
            sections.take(half, *shape),
            sections.take(half, *shape),
            sections.take(torch.int16, count),
        )
        kept = sections.take(half, count)
        codes = sections.take(torch.uint8, channels, packed_size(PAGE, self.bits))
        return levels, kept, unpack(codes, self.bits).mT


@dataclass(frozen=True, slots=True)
class Levels:
    """How the keys, or the values, of a page are stored."""

    points: Tensor
    """(N, L) int8, in order, as parts of a range."""
    middle: Tensor
    """(N, 1, C) or (N, E, 1) float16, of a range."""
    width: Tensor
    """Half of it, same shape and type."""
    places: Tensor
    """(N, X) int16, where outliers are among the E * C numbers."""


def _extremes(numbers: Tensor, dim: int, count: int) -> Tensor:
    """(N, X) int64, the numbers farthest from the mean along `dim`."""
    far = (numbers - numbers.mean(dim, keepdim=True)).abs()
    spread = far.square().mean(dim, keepdim=True).sqrt().clamp(min=HALF_TINY)
    return (far / spread).flatten(1).topk(count, 1).indices


def _nearest(scaled: Tensor, points: Tensor) -> Tensor:
    """(N, M) numbers -> (N, M) int64, the nearest of (N, L) points in order."""
    between = (points[:, 1:] + points[:, :-1]) / 2
    # Of equal points the first, so that packing again gives the same codes.
    code = torch.searchsorted(between, scaled.contiguous())
    return torch.searchsorted(points, points).gather(1, code)


def _lloyd(scaled: Tensor, weight: Tensor, count: int) -> Tensor:
    """Levels with a small weighted square error.

    Args:
        scaled: (N, M) numbers from -1 to 1.
        weight: (N, M), 0 for numbers that don't count.
        count: L.

    Returns:
        (N, L) int8 in order.
    """
    start = torch.linspace(-1, 1, count, device=scaled.device)
    points = start.expand(len(scaled), count).contiguous()
    for _ in range(LLOYD_STEPS):
        code = _nearest(scaled, points)
        total = torch.zeros_like(points).scatter_add_(1, code, weight)
        summed = torch.zeros_like(points).scatter_add_(1, code, weight * scaled)
        points = torch.where(total > 0, summed / total.clamp(min=TINY), points)
    return (points * LEVEL_UNIT).round().clamp(-LEVEL_UNIT, LEVEL_UNIT).to(torch.int8)


for _bits in (2, 3, 4):
    register(f"kvquant-{_bits}", NonUniform(_bits))
