"""Two widths in one page: what weighs more gets more bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec, register
from cachefold.cache.codecs.grid import Grid, groups, num_groups, span, ungroup
from cachefold.cache.codecs.packing import Sections, as_bytes, pack, packed_size, unpack
from cachefold.cache.codecs.uniform import Uniform

HALF = PAGE // 2


@dataclass(frozen=True, slots=True)
class Mixed:
    """The half of a page with more mass gets `high` bits, the other `low`.

    Ranges are those of `Uniform`, shared by both halves; only the points between differ.

    >>> codec = Mixed(4, 2)
    >>> pages = torch.linspace(0, 1, 32).view(1, 32, 1)
    >>> key, _ = codec.decode(codec.encode(pages, pages, pages[..., 0]), 1, 1)
    >>> error = (key - pages).abs()[0, :, 0]
    >>> bool(error[16:].max() < 0.034), bool(error[:16].max() > 0.1)
    (True, True)
    """

    high: int
    low: int

    @property
    def about(self) -> str:
        """One line for `cachefold ls codecs`."""
        return f"{self.high}-bit grids for the half of a page with more mass, {self.low} for others"

    @property
    def weighs(self) -> bool:
        """Yes."""
        return True

    def alone(self) -> tuple[Codec, Codec]:
        """More bits for the key: an entry alone has no other to weigh against."""
        return Uniform(self.high), Uniform(self.low)

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page: which half, two float16 for each grid, codes."""
        codes = packed_size(HALF, self.high + self.low) * (key_dim + value_dim)
        grids = 2 * torch.float16.itemsize * (key_dim + PAGE * num_groups(value_dim))
        return packed_size(PAGE, 1) + grids + codes

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages; see `Codec`."""
        dims, grouped = (key.shape[2], value.shape[2]), groups(value)
        if like is None:
            if mass is None:
                raise ValueError("a mixed codec needs the mass of the entries, (N, 32)")
            heavy = _heavy(mass)
            ranges = [_range(key, 1), _range(grouped, 3)]
        else:
            sections = Sections(like)
            heavy, ranges = _masks(sections), _ranges(sections, *dims)
        parts = [pack(heavy.to(torch.uint8), 1), *(x for both in ranges for x in both)]
        for bits, chosen in ((self.high, heavy), (self.low, ~heavy)):
            rows = _rows(chosen)
            codes = _grid(ranges[0], bits).codes(_pick(key, rows), bits)
            parts.append(pack(codes.mT.contiguous(), bits))
            grid = _grid((_pick(ranges[1][0], rows), _pick(ranges[1][1], rows)), bits)
            codes = ungroup(grid.codes(_pick(grouped, rows), bits), dims[1])
            parts.append(pack(codes.mT.contiguous(), bits))
        return torch.cat([as_bytes(part) for part in parts], 1)

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks pages; see `Codec`."""
        sections = Sections(packed)
        heavy, ranges = _masks(sections), _ranges(sections, key_dim, value_dim)
        key = torch.empty(len(packed), PAGE, key_dim, device=packed.device)
        value = torch.empty(len(packed), PAGE, value_dim, device=packed.device)
        for bits, chosen in ((self.high, heavy), (self.low, ~heavy)):
            rows, size = _rows(chosen), packed_size(HALF, bits)
            codes = unpack(sections.take(torch.uint8, key_dim, size), bits).mT
            _put(key, rows, _grid(ranges[0], bits).numbers(codes))
            codes = unpack(sections.take(torch.uint8, value_dim, size), bits).mT
            grid = _grid((_pick(ranges[1][0], rows), _pick(ranges[1][1], rows)), bits)
            _put(value, rows, ungroup(grid.numbers(groups(codes)), value_dim))
        return key, value


def _heavy(mass: Tensor) -> Tensor:
    """(N, PAGE) bool, True at the half with more mass; the earlier of equals."""
    order = mass.float().argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order[:, :HALF], True)


def _masks(sections: Sections) -> Tensor:
    return unpack(sections.take(torch.uint8, packed_size(PAGE, 1)), 1).bool()


def _rows(chosen: Tensor) -> Tensor:
    """(N, PAGE) bool, HALF True in each row -> (N, HALF) int64, where they are."""
    return chosen.nonzero(as_tuple=True)[1].view(len(chosen), HALF)


def _pick(numbers: Tensor, rows: Tensor) -> Tensor:
    """(N, PAGE, ...) -> (N, HALF, ...)."""
    return numbers[torch.arange(len(rows), device=rows.device)[:, None], rows]


def _put(numbers: Tensor, rows: Tensor, part: Tensor) -> None:
    numbers[torch.arange(len(rows), device=rows.device)[:, None], rows] = part


def _range(numbers: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Least number and the width of the range along `dim`, as float16."""
    least, most = torch.aminmax(numbers.float(), dim=dim, keepdim=True)
    grid = span(least, most, 1)
    return grid.low, grid.step


def _ranges(sections: Sections, key_dim: int, value_dim: int) -> list[tuple[Tensor, Tensor]]:
    """Of keys (N, 1, D) and of values (N, PAGE, G, 1)."""
    half, count = torch.float16, num_groups(value_dim)
    return [
        (sections.take(half, 1, key_dim), sections.take(half, 1, key_dim)),
        (sections.take(half, PAGE, count, 1), sections.take(half, PAGE, count, 1)),
    ]


def _grid(bounds: tuple[Tensor, Tensor], bits: int) -> Grid:
    """The grid of `bits` over a range."""
    low, width = bounds
    return Grid(low, width.float() / (2**bits - 1))


register("mixed", Mixed(4, 2))
