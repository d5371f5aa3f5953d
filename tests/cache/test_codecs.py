"""Codecs: exact sizes, bounded errors, and entries that can be replaced one by one."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.cache.codecs import (
    PAGE,
    Biased,
    Vectors,
    bits_per_element,
    describe_codecs,
    get_codec,
    list_codecs,
)
from cachefold.cache.codecs.packing import pack, packed_size, unpack

DIMS = [(64, 64), (80, 80), (128, 96), (256, 256), (40, 24), (6, 6)]
NUMBERS = st.sampled_from(["normal", "offset", "tiny", "huge", "constant", "one channel", "zero"])


def draw(kind: str, dim: int, seed: int, pages: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pages, PAGE, dim, generator=generator)
    if kind == "one channel":
        x[..., seed % dim] *= 300
    return {
        "normal": x, "offset": x * 1e-2 + 1000, "tiny": x * 1e-7, "huge": x * 1e6,
        "constant": x * 0 + 3.7, "one channel": x, "zero": x * 0,
    }[kind]  # fmt: skip


def masses(seed: int, pages: int = 3) -> torch.Tensor:
    return torch.rand(pages, PAGE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_unpack_undoes_pack(bits, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, PAGE), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == packed_size(PAGE, bits) == PAGE * bits // 8
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("name", list_codecs())
@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from(DIMS), key=NUMBERS, value=NUMBERS, seed=st.integers(0, 10**6),
    wide=st.booleans(),
)  # fmt: skip
def test_packing_again_gives_the_same_bits(name, dims, key, value, seed, wide):
    codec, dtype = get_codec(name), torch.float32 if wide else torch.bfloat16
    pages = draw(key, dims[0], seed).to(dtype), draw(value, dims[1], seed + 1).to(dtype)
    packed = codec.encode(*pages, masses(seed))
    assert packed.shape == (3, codec.page_nbytes(*dims)) and packed.dtype == torch.uint8
    decoded = codec.decode(packed, *dims)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in decoded)
    assert torch.equal(codec.encode(*decoded, like=packed), packed)


@pytest.mark.parametrize("name", list_codecs())
@settings(max_examples=15, deadline=None)
@given(dims=st.sampled_from(DIMS), seed=st.integers(0, 10**6), row=st.integers(0, PAGE - 1))
def test_one_entry_is_replaced_and_the_others_keep_their_numbers(name, dims, seed, row):
    codec = get_codec(name)
    packed = codec.encode(draw("normal", dims[0], seed), draw("normal", dims[1], 1), masses(2))
    before = codec.decode(packed, *dims)
    key, value = (x.clone() for x in before)
    key[:, row], value[:, row] = before[0][:, row - 1], before[1][:, row - 1]
    after = codec.decode(codec.encode(key, value, like=packed), *dims)
    others = torch.arange(PAGE) != row
    for old, new, wanted in zip(before, after, (key, value), strict=True):
        assert torch.equal(old[:, others], new[:, others])
        # Within the range of the page, at the bits that this place has.
        assert (new[:, row] - wanted[:, row]).abs().max() < old.abs().max()


@pytest.mark.parametrize("name", list_codecs())
def test_a_bias_is_beside_the_page_and_exact(name):
    codec = Biased(get_codec(name), torch.bfloat16)
    key, value = draw("normal", 33, 0).bfloat16(), draw("normal", 8, 1).bfloat16()
    packed = codec.encode(key, value, masses(2))
    assert packed.shape[1] == codec.page_nbytes(33, 8) == codec.codec.page_nbytes(32, 8) + 2 * PAGE
    plain = codec.codec.decode(codec.codec.encode(key[..., :32], value, masses(2)), 32, 8)
    decoded = codec.decode(packed, 33, 8)
    assert torch.equal(decoded[0], torch.cat([plain[0], key[..., 32:].float()], -1))
    assert torch.equal(decoded[1], plain[1])
    assert torch.equal(codec.encode(*decoded, like=packed), packed)


@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
@settings(max_examples=30, deadline=None)
@given(dims=st.sampled_from(DIMS), kind=NUMBERS, seed=st.integers(0, 10**6))
def test_even_grids_are_wrong_by_half_a_step(name, dims, kind, seed):
    """And by what float16 can't say of a range: an offset by 2**-11, a width by 2**-11."""
    if kind == "huge":
        return  # saturates, see below
    codec, bits = get_codec(name), int(name[3:])
    key, value = draw(kind, dims[0], seed), draw(kind, dims[1], seed + 1)
    got = codec.decode(codec.encode(key, value), *dims)
    errors = [(a - b).abs() for a, b in zip(got, (key, value), strict=True)]
    width = key.amax(1) - key.amin(1)
    step = width / (2**bits - 1) + key.abs().amax(1) * 2.0**-12 + 6.2e-5
    bound = 0.5 * step + width * 2.0**-11 + key.abs().amax(1) * 2.0**-11
    assert (errors[0] <= bound[:, None]).all()
    for first in range(0, dims[1], 32):
        group = value[..., first : first + 32]
        width = group.amax(2) - group.amin(2)
        most = group.abs().amax(2)
        step = width / (2**bits - 1) + most * 2.0**-12 + 6.2e-5
        bound = 0.5 * step + width * 2.0**-11 + most * 2.0**-11
        assert (errors[1][..., first : first + 32] <= bound[..., None]).all()


def test_floats_round_and_saturate():
    key, value = draw("normal", 64, 0), draw("huge", 64, 1)
    got = get_codec("fp8").decode(get_codec("fp8").encode(key, value), 64, 64)
    assert ((got[0] - key).abs() <= key.abs() * 2.0**-4 + 2.0**-10).all()
    assert (got[1].abs() <= 448).all() and torch.equal(got[1].sign(), value.sign())
    got = get_codec("bf16").decode(get_codec("bf16").encode(key, key), 64, 64)
    assert torch.equal(got[0], key.bfloat16().float())


@pytest.mark.parametrize("name", ["kvquant-2", "kvquant-3", "kvquant-4"])
def test_outliers_are_exact_and_leave_the_grid_alone(name):
    codec, key = get_codec(name), draw("normal", 64, 0)
    plain = codec.decode(codec.encode(key, key), 64, 64)[0]
    key[:, 3, 5] = 5000.0
    got = codec.decode(codec.encode(key, key), 64, 64)
    assert (got[0][:, 3, 5] == 5000).all() and (got[1][:, 3, 5] == 5000).all()
    others = torch.arange(PAGE) != 3
    wrong = [(x[:, others] - key[:, others]).square().mean() for x in (got[0], got[1], plain)]
    assert wrong[0] < 1.1 * wrong[2] and wrong[1] < 1.3 * wrong[2]
    assert ((got[0] == key.half().float()).float().sum((1, 2)) >= 21).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_fitted_levels_beat_even_ones(bits):
    key, value = draw("normal", 64, 0), draw("normal", 64, 1)
    wrong = {}
    for name in (f"int{bits}", f"kvquant-{bits}"):
        got = get_codec(name).decode(get_codec(name).encode(key, value), 64, 64)
        wrong[name] = sum(
            float((a - b).square().mean()) for a, b in zip(got, (key, value), strict=True)
        )
    assert wrong[f"kvquant-{bits}"] < wrong[f"int{bits}"]


def test_more_mass_gets_more_bits():
    codec, mass = get_codec("mixed"), masses(0)
    key, value = draw("normal", 80, 0), draw("normal", 96, 1)
    got = codec.decode(codec.encode(key, value, mass), 80, 96)
    heavy = mass >= mass.sort(1).values[:, PAGE // 2 :][:, :1]
    for numbers, wanted in zip(got, (key, value), strict=True):
        wrong = (numbers - wanted).square().mean(2)
        assert wrong[heavy].mean() < wrong[~heavy].mean() / 10
    step = (key.amax(1) - key.amin(1)) / 15
    assert ((got[0] - key).abs() <= 0.53 * step[:, None])[heavy].all()
    with pytest.raises(ValueError, match="needs the mass"):
        codec.encode(key, value)


@pytest.mark.parametrize(
    ("name", "dims", "nbytes"),
    [
        ("bf16", (64, 64), 32 * 128 * 2),
        ("fp8", (80, 64), 32 * 144),
        # Codes, then 4 bytes for each of 64 key channels and 32 x 2 value groups.
        ("int8", (64, 64), 32 * 128 + 4 * (64 + 64)),
        ("int4", (64, 64), 32 * 128 // 2 + 4 * (64 + 64)),
        ("int4", (80, 80), 32 * 160 // 2 + 4 * (80 + 96)),
        ("int2", (64, 64), 32 * 128 // 4 + 4 * (64 + 64)),
        # Levels, scales of 64 channels and 32 entries, 21 + 21 outliers of 4 bytes, codes.
        ("kvquant-3", (64, 64), 2 * 8 + 4 * 96 + 42 * 4 + 32 * 128 * 3 // 8),
        ("mixed", (64, 64), 4 + 4 * 128 + 32 * 128 * 3 // 8),
    ],
)
def test_pages_are_as_large_as_said(name, dims, nbytes):
    assert get_codec(name).page_nbytes(*dims) == nbytes
    bits = bits_per_element(get_codec(name), *dims)
    assert bits == nbytes * 8 / (32 * sum(dims))


@pytest.mark.parametrize("name", list_codecs())
@settings(max_examples=15, deadline=None)
@given(dim=st.sampled_from([64, 80, 6]), kind=NUMBERS, seed=st.integers(0, 10**6))
def test_a_vector_is_packed_without_regard_to_others(name, dim, kind, seed):
    numbers = draw(kind, dim, seed)
    for codec in get_codec(name).alone():
        vectors = Vectors(codec, dim)
        packed = vectors.encode(numbers)
        assert packed.shape == (3, PAGE, vectors.nbytes) and packed.dtype == torch.uint8
        assert torch.equal(vectors.encode(numbers[1:2, 7]), packed[1:2, 7])
        decoded = vectors.decode(packed)
        assert decoded.shape == numbers.shape and decoded.isfinite().all()
        assert torch.equal(vectors.decode(packed[1, 7]), decoded[1, 7])
        assert vectors.encode(numbers[:0]).shape == (0, PAGE, vectors.nbytes)
        # A slot that nothing was written to.
        assert not vectors.decode(torch.zeros_like(packed)).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_vectors_are_wrong_by_half_a_step_of_their_group(bits):
    numbers, vectors = draw("normal", 80, 0), Vectors(get_codec(f"int{bits}"), 80)
    wrong = (vectors.decode(vectors.encode(numbers)) - numbers).abs()
    for first in (0, 32, 64):
        group = numbers[..., first : first + 32]
        step = (group.amax(-1) - group.amin(-1)) / (2**bits - 1)
        assert (wrong[..., first : first + 32] <= 0.5 * step[..., None] + 3e-3).all()


@pytest.mark.parametrize(
    ("name", "dim", "nbytes"),
    [
        ("bf16", 64, (128, 128)),
        ("fp8", 64, (64, 64)),
        # Codes, then 4 bytes for each group of 32 channels.
        ("int8", 64, (72, 72)),
        ("int4", 64, (40, 40)),
        ("int2", 128, (48, 48)),
        # A group that is not full takes as much as one that is.
        ("int4", 80, (60, 60)),
        # Levels, scales of 2 groups, one outlier, codes.
        ("kvquant-3", 64, (8 + 8 + 4 + 24, 8 + 8 + 4 + 24)),
        ("mixed", 64, (40, 24)),
    ],
)
def test_vectors_are_as_large_as_said(name, dim, nbytes):
    assert tuple(Vectors(codec, dim).nbytes for codec in get_codec(name).alone()) == nbytes


def test_unknown_names_teach():
    with pytest.raises(ValueError, match=r"unknown codec 'int5'. Did you mean 'int\d'"):
        get_codec("int5")
    assert set(describe_codecs()) == set(list_codecs())
    with pytest.raises(ValueError, match="too large for codec kvquant"):
        get_codec("kvquant-2").page_nbytes(1024, 64)


@pytest.mark.parametrize(
    "name",
    ["base", "biased", "grid", "mixed", "nonuniform", "packing", "plain", "uniform", "vectors"],
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.cache.codecs.{name}"))
    assert result.attempted > 0 and result.failed == 0
