"""What the CPU kernels share: passes of some query rows over entries in pages and exact tokens.

Entries go by strips of 16, a block of strips at a time through an online softmax; nothing is
copied out of the pages. Everything is an address or a size in int64: arrays would cost more to
hand over than a short step takes.

Legend: G query heads per kv head, D key dim, Dv value dim, R rows = query positions x G.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from array import array
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import cfunc, njit, prange, types

from cachefold.attention.vectors import (
    HIDDEN,
    LANES,
    call_at,
    make_bias,
    make_dots,
    make_load,
    make_score,
    make_soften,
    make_store,
    make_weigh,
)

BLOCK = 8
"""Strips per softmax block: keys and values of a block stay in the second cache in between."""
LOG2_E = math.log2(math.e)

load_byte, load_int, load_long = make_load("int8"), make_load("int32"), make_load("int64")
load_float, store_float = make_load("float32"), make_store("float32")
store_byte, store_long = make_store("int8"), make_store("int64")
compiled = njit(nogil=True, error_model="numpy")


def procedure(function: Any) -> Any:
    """Compiles a function of int64 arguments once, called through its address.

    numba would compile what it inlines again in every caller: seconds for a chain of kernels.
    """
    count = function.__code__.co_argcount
    signature = types.void(*[types.int64] * count)
    compiled_once = cfunc(signature, error_model="numpy")(function)
    pointer = compiled_once.ctypes
    pointer.compiled, pointer.address = compiled_once, compiled_once.address  # code must live on
    return pointer


@njit(nogil=True, error_model="numpy", parallel=True)
def _launch(kernel: int, call: int, threads: int) -> None:
    for thread in prange(threads):
        call_at(kernel, call, thread)  # type: ignore[call-arg]


def packed(fields: tuple[int, ...]) -> array[int]:
    """The fields of a kernel, a NamedTuple that `offsets` knows, as `launch` takes them.

    >>> packed((1, 2)).tolist()
    [1, 2]
    """
    return array("q", fields)


def launch(kernel: Any, fields: array[int], threads: int) -> None:
    """Runs kernel(call, thread), a procedure, on so many threads at once.

    Args:
        kernel: reads its fields at `call + AT.name`, as `offsets` says.
        fields: int64.
        threads: 1 runs here, without waking any other.
    """
    call, _ = fields.buffer_info()
    if threads == 1:
        kernel(call, 0)
    else:
        _start_threads()
        _launch(kernel.address, call, threads)


@functools.cache
def _start_threads() -> None:
    """Starts numba's threads and leaves torch its own number of them: both set that of OpenMP."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


@compiled
def item(call: int, field: int, place: int) -> int:
    """Address of what lies `place` bytes into the tensor of a field."""
    return load_long(call + field) + place


def offsets(kind: Any) -> Any:
    """A NamedTuple of this kind with the byte offset of each of its fields."""
    return kind(*range(0, 8 * len(kind._fields), 8))


def float_bits(number: float) -> int:
    """The bits of a float32, for `load_float` at the offset of a field.

    >>> hex(float_bits(1.0))
    '0x3f800000'
    """
    return int.from_bytes(struct.pack("=f", number), sys.byteorder)


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    groups: int
    """G"""
    key_dim: int
    """D, a multiple of 16"""
    value_dim: int
    """Dv, a multiple of 16"""
    page_size: int
    half: bool
    """Entries, queries and tokens are bfloat16, else float32."""
    softcap: float
    """0 = none"""
    biased: bool = False
    """Entries have a bias: a channel of their keys in the pages behind the D."""


class Work(NamedTuple):
    """Offsets into the scratch of a thread, in bytes, for R rows; all of it float32."""

    query: int
    top: int
    total: int
    sums: int
    scores: int
    visible: int
    keys: int
    values: int


def make_work(shape: Shape, rows: int) -> Work:
    """Where the parts of the scratch lie; `keys` and `values` of the exact tokens come last."""
    sizes = [
        rows * shape.key_dim * 4, rows * 4, rows * LANES * 4, rows * shape.value_dim * 4,
        rows * BLOCK * LANES * 4, rows * 8,
    ]  # fmt: skip
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 64) * 64)
    return Work._make([*starts, starts[-1] + BLOCK * LANES * shape.key_dim * 4])


@functools.cache
def work_nbytes(shape: Shape, rows: int) -> int:
    """Bytes of the scratch of a thread."""
    return make_work(shape, rows).values + BLOCK * LANES * shape.value_dim * 4


class Passes(NamedTuple):
    """Numba functions over the rows of one kv head; `work` is the address of the scratch."""

    begin: Any
    """begin(work, position, key, value, bias): the open entry of a position, float32; key 0 = none,
    bias 0 = none."""
    see_entries: Any
    """see_entries(work, pages, table, begin, end): strips [begin, end) of the entries; the rows
    see as many entries as `Work.visible` says."""
    see_tokens: Any
    """see_tokens(work, count, first, row, delay, valid): exact tokens [first, first + count) of
    the text, widened to the scratch; `row` is the place of the first position in the text."""
    inverse: Any
    """inverse(work, row): 1 / the sum of the weights of a row, 0 if it saw nothing."""


@functools.cache
def make_passes(shape: Shape, rows: int) -> Passes:
    """The passes for `rows` rows, a multiple of G."""
    at, groups, softcap = make_work(shape, rows), shape.groups, shape.softcap
    positions, stride, size = rows // shape.groups, BLOCK * LANES * 4, 2 if shape.half else 4
    key_dim, value_dim, per_page = shape.key_dim, shape.value_dim, shape.page_size // LANES
    biased = shape.biased
    bias_bytes = shape.page_size * key_dim * size
    key_bytes = bias_bytes + shape.page_size * shape.biased * size
    page_bytes = key_bytes + shape.page_size * value_dim * size
    key_strip, value_strip = LANES * size, LANES * value_dim * size
    score = make_score(rows, key_dim, shape.page_size, shape.half, shape.biased)
    weigh = make_weigh(rows, value_dim, shape.half)
    weigh_tokens = make_weigh(rows, value_dim, False)
    soften, dots = make_soften(rows, value_dim), make_dots(rows, key_dim)
    dots_open = make_dots(groups, key_dim)
    add_bias = make_bias(rows, shape.half, LOG2_E)

    @compiled
    def cap(place: int, count: int) -> None:
        for i in range(count):
            raw = load_float(place + 4 * i)
            capped = np.float32(softcap * LOG2_E) * np.tanh(raw / np.float32(softcap))
            store_float(place + 4 * i, np.float32(capped))

    @procedure
    def begin(work: int, position: int, key: int, value: int, bias: int) -> None:
        first = position * groups
        dots_open(work + at.query + first * key_dim * 4, key or work, work + at.top + first * 4, 4)
        if softcap:
            cap(work + at.top + first * 4, groups)
        extra = load_float(bias) * np.float32(LOG2_E) if bias else np.float32(0.0)
        for row in range(first, first + groups):
            top = load_float(work + at.top + row * 4) + extra if key else np.float32(HIDDEN)
            store_float(work + at.top + row * 4, top)
            for lane in range(LANES):
                weight = 1.0 if key and lane == 0 else 0.0
                store_float(work + at.total + (row * LANES + lane) * 4, np.float32(weight))
            for d in range(value_dim):
                number = load_float(value + d * 4) if key else np.float32(0.0)
                store_float(work + at.sums + (row * value_dim + d) * 4, number)

    @compiled
    def finish_block(work: int, count: int) -> None:
        if softcap:
            for row in range(rows):
                cap(work + at.scores + row * stride, count * LANES)

    @compiled
    def hide_entries(work: int, first: int, count: int) -> None:
        """Hides entries from `first` on that a row doesn't see, in a block of so many strips."""
        for position in range(positions):
            seen = load_long(work + at.visible + position * 8)
            for column in range(max(seen - first, 0), count * LANES):
                for g in range(groups):
                    row = work + at.scores + (position * groups + g) * stride
                    store_float(row + column * 4, np.float32(HIDDEN))

    @compiled
    def strip_at(pages: int, table: int, strip: int) -> tuple[int, int]:
        page = pages + load_int(table + strip // per_page * 4) * page_bytes
        within = strip % per_page
        return page + within * key_strip, page + key_bytes + within * value_strip

    @procedure
    def see_entries(work: int, pages: int, table: int, begin: int, end: int) -> None:
        scores = work + at.scores
        fewest = load_long(work + at.visible)
        most = load_long(work + at.visible + (positions - 1) * 8)
        for first in range(begin, end, BLOCK):
            count = min(BLOCK, end - first)
            for j in range(count):
                keys, _ = strip_at(pages, table, first + j)
                upcoming, _ = strip_at(pages, table, min(first + j + BLOCK, end - 1))
                score(work + at.query, keys, scores + j * 64, stride, upcoming)
            finish_block(work, count)
            if biased:
                for j in range(count):
                    keys, _ = strip_at(pages, table, first + j)
                    add_bias(keys + bias_bytes, scores + j * 64, stride)
            if (first + count) * LANES > fewest:
                hide_entries(work, first * LANES, count)
            soften(scores, stride, count, work + at.top, work + at.total, work + at.sums)
            for j in range(count):
                _, values = strip_at(pages, table, first + j)
                _, upcoming = strip_at(pages, table, min(first + j + BLOCK, end - 1))
                real = min(LANES, most - (first + j) * LANES)
                weigh(scores + j * 64, stride, values, real, work + at.sums, upcoming)

    @procedure
    def see_tokens(work: int, count: int, first: int, row: int, delay: int, valid: int) -> None:
        scores, lanes = work + at.scores, -(-count // LANES) * LANES
        for j in range(count):
            dots(work + at.query, work + at.keys + j * key_dim * 4, scores + j * 4, stride)
        finish_block(work, lanes // LANES)
        for position in range(positions):
            for j in range(lanes):
                age = row + position - first - j
                seen = j < count and 0 <= age < delay and load_byte(valid + first + j) != 0
                for g in range(0 if seen else groups):
                    place = scores + (position * groups + g) * stride + j * 4
                    store_float(place, np.float32(HIDDEN))
        top, total = work + at.top, work + at.total
        soften(scores, stride, lanes // LANES, top, total, work + at.sums)
        values = work + at.values
        weigh_tokens(scores, stride, values, count, work + at.sums, values)

    @compiled
    def inverse(work: int, row: int) -> np.float32:
        total = np.float32(0.0)
        for lane in range(LANES):
            total += load_float(work + at.total + (row * LANES + lane) * 4)
        return np.float32(1.0) / total if total > 0 else np.float32(0.0)

    return Passes(begin, see_entries, see_tokens, inverse)
