"""Small codes to bytes and back, and sections of bytes within a packed page.

Legend: N pages, E entries, a multiple of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes, a multiple of 8.

    >>> packed_size(32, 3)
    12
    """
    assert count % 8 == 0
    return count * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the last dim.

    Args:
        codes: (..., E) uint8 below 2**bits.
        bits: 1 to 8.

    Returns:
        (..., E * bits / 8) uint8.

    >>> pack(torch.tensor([[1, 2, 3, 0, 1, 2, 3, 0]], dtype=torch.uint8), 2).tolist()
    [[221, 34]]
    """
    planes = []
    for width, shift in _widths(bits):
        part = codes.bitwise_right_shift(shift).bitwise_and(2**width - 1)
        # A byte holds codes that lie far apart, so that unpacking joins whole runs.
        part = part.unflatten(-1, (8 // width, -1))
        byte = part.select(-2, 0)
        for i in range(1, 8 // width):
            byte = byte.bitwise_or(part.select(-2, i).bitwise_left_shift(i * width))
        planes.append(byte)
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undoes `pack`.

    >>> unpack(torch.tensor([[221, 34]], dtype=torch.uint8), 2).tolist()
    [[1, 2, 3, 0, 1, 2, 3, 0]]
    """
    count = packed.shape[-1] * 8 // bits
    codes, start = None, 0
    for width, shift in _widths(bits):
        byte = packed.narrow(-1, start, count * width // 8)
        start += count * width // 8
        part = torch.stack([byte.bitwise_right_shift(i) for i in range(0, 8, width)], -2)
        part = part.bitwise_and(2**width - 1).flatten(-2).bitwise_left_shift(shift)
        codes = part if codes is None else codes.bitwise_or(part)
    assert codes is not None
    return codes


def _widths(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of parts that divide a byte: 3 bits are 2 and 1."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if (bits - shift) >= width:
            found.append((width, shift))
            shift += width
    return found


def as_bytes(tensor: Tensor) -> Tensor:
    """(N, ...) of any type -> (N, bytes) uint8.

    >>> as_bytes(torch.ones(1, 1, dtype=torch.float16)).tolist()
    [[0, 60]]
    """
    return tensor.contiguous().flatten(1).view(torch.uint8)


class Sections:
    """Takes a packed page apart, from its beginning on.

    >>> sections = Sections(torch.tensor([[0, 60, 7]], dtype=torch.uint8))
    >>> sections.take(torch.float16, 1).tolist(), sections.take(torch.uint8, 1, 1).tolist()
    ([[1.0]], [[[7]]])
    """

    def __init__(self, packed: Tensor) -> None:
        self._packed, self._start = packed, 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The next (N, *shape) numbers."""
        count = dtype.itemsize
        for size in shape:
            count *= size
        if not count:
            return self._packed.new_empty(len(self._packed), *shape, dtype=dtype)
        # A copy: a view of another type needs aligned bytes.
        part = self._packed.narrow(1, self._start, count).clone(
            memory_format=torch.contiguous_format
        )
        self._start += count
        return part.view(dtype).view(len(part), *shape)
