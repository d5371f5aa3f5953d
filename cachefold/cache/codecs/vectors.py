"""Vectors packed one by one, for entries that come and go one by one.

A vector is packed as a page of keys is, its groups of 32 channels in the place of channels and the
32 channels of a group in the place of entries: what shares a grid is then a group of one vector.

Legend: D channels, G groups of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec
from cachefold.cache.codecs.grid import GROUP, groups, num_groups, ungroup

assert GROUP == PAGE


@dataclass(frozen=True, slots=True)
class Vectors:
    """Packs vectors of one size by a codec. Packing depends on nothing but the vector itself.

    >>> import torch
    >>> from cachefold.cache.codecs import get_codec
    >>> vectors = Vectors(get_codec("int8"), 64)
    >>> numbers = torch.linspace(0, 1, 64).view(1, 64)
    >>> packed = vectors.encode(numbers)
    >>> packed.shape, bool(((vectors.decode(packed) - numbers).abs() < 0.002).all())
    (torch.Size([1, 72]), True)
    """

    codec: Codec
    """One that doesn't weigh: see `Codec.alone`."""
    dim: int
    """D."""

    @property
    def nbytes(self) -> int:
        """Bytes of a packed vector, scales and all else included."""
        return self.codec.page_nbytes(num_groups(self.dim), 0)

    def encode(self, numbers: Tensor) -> Tensor:
        """Packs (..., D) of any floating type, finite, to (..., nbytes) uint8."""
        page = groups(numbers.reshape(-1, 1, self.dim)).squeeze(1).mT
        return self.codec.encode(page, page[..., :0]).view(*numbers.shape[:-1], self.nbytes)

    def decode(self, packed: Tensor) -> Tensor:
        """Unpacks (..., nbytes) uint8 to (..., D) float32."""
        page, _ = self.codec.decode(packed.reshape(-1, self.nbytes), num_groups(self.dim), 0)
        return ungroup(page.mT.unsqueeze(1), self.dim).reshape(*packed.shape[:-1], self.dim)
