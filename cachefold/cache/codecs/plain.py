"""Entries as shorter floats, without scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec, register
from cachefold.cache.codecs.packing import Sections, as_bytes


@dataclass(frozen=True, slots=True)
class Float:
    """Rounds every number to a shorter float; what is beyond its range saturates.

    >>> codec = Float(torch.float8_e4m3fn)
    >>> pages = torch.full((1, 32, 1), 1000.0)
    >>> codec.decode(codec.encode(pages, pages), 1, 1)[0][0, 0].item()
    448.0
    """

    dtype: torch.dtype

    @property
    def about(self) -> str:
        """One line for `cachefold ls codecs`."""
        if self.dtype.itemsize == 1:
            return "8-bit floats (e4m3), saturating"
        return "bfloat16"

    @property
    def weighs(self) -> bool:
        """No."""
        return False

    def alone(self) -> tuple[Codec, Codec]:
        """The same for both."""
        return self, self

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page."""
        return PAGE * (key_dim + value_dim) * self.dtype.itemsize

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages; see `Codec`."""
        most = torch.finfo(self.dtype).max
        parts = [x.float().clamp(-most, most).to(self.dtype) for x in (key, value)]
        return torch.cat([as_bytes(part) for part in parts], 1)

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks pages; see `Codec`."""
        sections = Sections(packed)
        key = sections.take(self.dtype, PAGE, key_dim)
        value = sections.take(self.dtype, PAGE, value_dim)
        return key.float(), value.float()


register("bf16", Float(torch.bfloat16))
register("fp8", Float(torch.float8_e4m3fn))
