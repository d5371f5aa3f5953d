"""Pages of entries that have a bias: the codec packs all but that.

Legend: N pages, D key dim with the bias, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.cache.codecs.base import PAGE, Codec


@dataclass(frozen=True, slots=True)
class Biased:
    """A codec for keys whose last channel is a bias, which stays as it is.

    A bias is added to the scores as it stands, where the error of a channel of the key is divided
    by the root of the head dim: at a few bits it would cost more than all channels together.

    Args:
        codec: packs the other channels and the values.
        dtype: of a bias in its page.

    >>> from cachefold.cache.codecs import get_codec
    >>> codec = Biased(get_codec("int2"), torch.bfloat16)
    >>> key = torch.linspace(-1, 1, 32).view(1, 32, 1).bfloat16().expand(1, 32, 3)
    >>> decoded, _ = codec.decode(codec.encode(key, key), 3, 3)
    >>> torch.equal(decoded[..., 2], key[..., 2].float()), torch.equal(decoded, key.float())
    (True, False)
    """

    codec: Codec
    dtype: torch.dtype

    @property
    def about(self) -> str:
        """One line, as of the codec."""
        return f"{self.codec.about}; biases exact"

    @property
    def weighs(self) -> bool:
        """Whether `encode` needs the mass of the entries."""
        return self.codec.weighs

    def alone(self) -> tuple[Codec, Codec]:
        """What packs an entry without a page, which has no bias."""
        return self.codec.alone()

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page, biases included."""
        return self.codec.page_nbytes(key_dim - 1, value_dim) + PAGE * self.dtype.itemsize

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages; see `Codec.encode`."""
        bias = key[..., -1].to(self.dtype).contiguous().view(torch.uint8)
        like = None if like is None else like[:, : -bias.shape[1]]
        return torch.cat([self.codec.encode(key[..., :-1], value, mass, like), bias], -1)

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks pages; see `Codec.decode`."""
        width = PAGE * self.dtype.itemsize
        key, value = self.codec.decode(packed[:, :-width].contiguous(), key_dim - 1, value_dim)
        aligned = packed[:, -width:].clone(memory_format=torch.contiguous_format)
        bias = aligned.view(self.dtype)
        return torch.cat([key, bias[..., None].to(key.dtype)], -1), value
