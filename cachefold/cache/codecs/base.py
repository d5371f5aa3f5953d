"""What a codec is, and the registry of codecs.

A codec packs whole pages: `PAGE` entries of one (request, kv head), keys rotated.

Legend: N pages, D key dim, Dv value dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cachefold.core.names import closest

PAGE = 32
"""Entries that are packed together."""


class Codec(Protocol):
    """A way to store pages of entries in bytes; a frozen dataclass made known by `register`."""

    @property
    def about(self) -> str:
        """One line for `cachefold ls codecs`."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether `encode` needs the mass of the entries."""
        ...

    def alone(self) -> tuple[Codec, Codec]:
        """What packs the key and the value of an entry without a page; see `vectors`."""
        ...

    def page_nbytes(self, key_dim: int, value_dim: int) -> int:
        """Bytes of a packed page, scales and all else included."""
        ...

    def encode(
        self, key: Tensor, value: Tensor, mass: Tensor | None = None, like: Tensor | None = None
    ) -> Tensor:
        """Packs pages.

        Args:
            key: (N, PAGE, D) of any floating type, finite.
            value: (N, PAGE, Dv); Dv = 0 takes no bytes.
            mass: (N, PAGE) importance of the entries; only needed if it `weighs`, without `like`.
            like: (N, page_nbytes) uint8, packed pages whose scales, levels and places are taken
                over, so that entries of a page can be replaced and all others keep their bits:
                `encode(*decode(p, D, Dv), like=p)` is `p`, bit for bit.

        Returns:
            (N, page_nbytes) uint8.
        """
        ...

    def decode(self, packed: Tensor, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Unpacks (N, page_nbytes) uint8 to (N, PAGE, D) and (N, PAGE, Dv), float32."""
        ...


_CODECS: dict[str, Codec] = {}


def register(name: str, codec: Codec) -> None:
    """Makes a codec known under `name`."""
    assert name not in _CODECS, f"codec {name!r} registered twice"
    _CODECS[name] = codec


def list_codecs() -> list[str]:
    """Names of all codecs, sorted.

    >>> "int4" in list_codecs()
    True
    """
    return sorted(_CODECS)


def describe_codecs() -> dict[str, str]:
    """One line on each codec, with its bits per number at 64 channels, everything included.

    >>> describe_codecs()["fp8"]
    '8-bit floats (e4m3), saturating; 8.00 bits per number'
    """
    return {
        name: f"{_CODECS[name].about}; {bits_per_element(_CODECS[name], 64, 64):.2f} bits per "
        "number"
        for name in list_codecs()
    }


def get_codec(name: str) -> Codec:
    """Finds a codec by its name.

    Raises:
        ValueError: unknown name, with the closest match.

    >>> get_codec("int4").page_nbytes(64, 64)
    2560
    """
    if name not in _CODECS:
        allowed = list_codecs()
        raise ValueError(
            f"unknown codec {name!r}.{closest(name, allowed)} Available: {', '.join(allowed)}; "
            "None keeps entries in the dtype of the model. See `cachefold ls codecs`."
        )
    return _CODECS[name]


def bits_per_element(codec: Codec, key_dim: int, value_dim: int) -> float:
    """Bits per number of a packed page, scales and all else included.

    >>> bits_per_element(get_codec("int4"), 64, 64)
    5.0
    """
    return codec.page_nbytes(key_dim, value_dim) * 8 / (PAGE * (key_dim + value_dim))
