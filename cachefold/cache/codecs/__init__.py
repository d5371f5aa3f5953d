"""How entries are stored: one codec, one short file; `base` holds the registry."""

from cachefold.cache.codecs.base import (
    PAGE,
    Codec,
    bits_per_element,
    describe_codecs,
    get_codec,
    list_codecs,
)
from cachefold.cache.codecs.biased import Biased
from cachefold.cache.codecs.mixed import Mixed
from cachefold.cache.codecs.nonuniform import NonUniform
from cachefold.cache.codecs.plain import Float
from cachefold.cache.codecs.uniform import Uniform
from cachefold.cache.codecs.vectors import Vectors

__all__ = [
    "PAGE",
    "Biased",
    "Codec",
    "Float",
    "Mixed",
    "NonUniform",
    "Uniform",
    "Vectors",
    "bits_per_element",
    "describe_codecs",
    "get_codec",
    "list_codecs",
]
