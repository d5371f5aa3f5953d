"""Even grids of 2 to 8 bits: keys by channel, values by entry (KIVI, Liu et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec, register
from cachefold.cache.codecs.grid import Grid, fit, groups, num_groups, ungroup
from cachefold.cache.codecs.packing import Sections, as_bytes, pack, packed_size, unpack


@dataclass(frozen=True, slots=True)
class Uniform:
    """Asymmetric grids: one for each channel of the keys of a page, one for 32 channels of a value.

    Some channels of keys are large in every entry, so that a grid of a channel fits them; values
    have no such channels.

    >>> codec = Uniform(8)
    >>> pages = torch.linspace(0, 1, 32).view(1, 32, 1)
    >>> key, _ = codec.decode(codec.encode(pages, pages), 1, 1)
    >>> bool(((key - pages).abs() < 0.003).all())
    True
    """

    bits: int

    @property
    def about(self) -> str:
        """One line for `cachefold ls codecs`."""
        return f"{self.bits}-bit grids, keys by channel, values by entry (KIVI)"

    @property
    def weighs(self) -> bool:
        """No."""
        return False

    def alone(self) -> tuple[Codec, Codec]:
        """The same for both."""
        return self, self

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page: codes, and two float16 for each grid."""
        codes = packed_size(PAGE, self.bits) * (key_dim + value_dim)
        return codes + 2 * torch.float16.itemsize * (key_dim + PAGE * num_groups(value_dim))

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages; see `Codec`."""
        dims, grouped = (key.shape[2], value.shape[2]), groups(value)
        if like is None:
            grids = fit(key, 1, self.bits), fit(grouped, 3, self.bits)
        else:
            grids = _grids(Sections(like), *dims)
        key_codes = grids[0].codes(key, self.bits)
        value_codes = ungroup(grids[1].codes(grouped, self.bits), dims[1])
        parts = [x for grid in grids for x in (grid.low, grid.step)]
        parts += [pack(codes.mT.contiguous(), self.bits) for codes in (key_codes, value_codes)]
        return torch.cat([as_bytes(part) for part in parts], 1)

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks pages; see `Codec`."""
        sections = Sections(packed)
        key_grid, value_grid = _grids(sections, key_dim, value_dim)
        size = packed_size(PAGE, self.bits)
        key = unpack(sections.take(torch.uint8, key_dim, size), self.bits).mT
        value = unpack(sections.take(torch.uint8, value_dim, size), self.bits).mT
        numbers = ungroup(value_grid.numbers(groups(value)), value_dim)
        return key_grid.numbers(key), numbers


def _grids(sections: Sections, key_dim: int, value_dim: int) -> tuple[Grid, Grid]:
    """Grids of keys (N, 1, D) and of values (N, PAGE, G, 1)."""
    half, count = torch.float16, num_groups(value_dim)
    return (
        Grid(sections.take(half, 1, key_dim), sections.take(half, 1, key_dim)),
        Grid(sections.take(half, PAGE, count, 1), sections.take(half, PAGE, count, 1)),
    )


for _bits in (2, 4, 8):
    register(f"int{_bits}", Uniform(_bits))
