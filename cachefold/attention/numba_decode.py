"""Decode attention on the CPU: one query position per request over its ragged pages.

All strips of all requests and heads are split evenly over the threads (split-K), so that heads
of any length keep every core busy; a second pass joins the parts of a head.

Legend: B requests, K kv heads, H query heads, D key dim, Dv value dim, N exact tokens, C columns
of the block table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cachefold.attention.numba_kernels import (
    BLOCK,
    LOG2_E,
    Shape,
    compiled,
    load_byte,
    load_float,
    load_long,
    make_passes,
    make_work,
    offsets,
    procedure,
    store_float,
    store_long,
)
from cachefold.attention.vectors import LANES, make_copies

OWN = 2
"""Work of a head besides its entries (ring, open entry), in strips."""


class Decode(NamedTuple):
    """Addresses, then sizes. Queries and keys are rotated."""

    query: int
    """(B, H, D) float32"""
    open_key: int
    """(B, K, D) float32"""
    open_value: int
    """(B, K, Dv) float32"""
    open_valid: int
    """(B,) bool"""
    exact_key: int
    """(B, K, N, D) float32"""
    exact_value: int
    """(B, K, N, Dv) of the model"""
    exact_valid: int
    """(B, N) bool"""
    visible: int
    """(B, K) int64"""
    pages: int
    table: int
    """(B, K, C) int32"""
    work: int
    """Scratch of every thread."""
    work_nbytes: int
    """Of one thread."""
    parts: int
    """(threads, B, H, Dv + 2) float32 scratch: largest score, sum of weights, weighted values."""
    out: int
    """(B, H, Dv) of the model"""
    requests: int
    kv_heads: int
    num_exact: int
    columns: int
    threads: int
    scaling: int
    """Bits of the float32."""


AT = offsets(Decode)


@functools.cache
def make_decode(shape: Shape) -> tuple[Any, Any]:
    """Two procedures of (fields of Decode, thread): each thread its share, then one joins."""
    groups, key_dim, value_dim = shape.groups, shape.key_dim, shape.value_dim
    size, at, part_size = 2 if shape.half else 4, make_work(shape, groups), value_dim + 2
    factor = np.float32(1.0 if shape.softcap else LOG2_E)
    begin, see_entries, see_tokens, _ = make_passes(shape, groups)
    plain, copies = make_copies(False), make_copies(shape.half)
    copy, widen, narrow = plain.widen, copies.widen, copies.narrow

    @compiled
    def extent(d: int, head: int) -> int:
        return OWN + -(-load_long(load_long(d + AT.visible) + head * 8) // LANES)

    @compiled
    def see_exact(d: int, work: int, head: int) -> None:
        valid = load_long(d + AT.exact_valid) + head // load_long(d + AT.kv_heads) * load_long(
            d + AT.num_exact
        )
        for first in range(0, load_long(d + AT.num_exact), BLOCK * LANES):
            count, place = (
                min(BLOCK * LANES, load_long(d + AT.num_exact) - first),
                head * load_long(d + AT.num_exact) + first,
            )
            copy(load_long(d + AT.exact_key) + place * key_dim * 4, count * key_dim, work + at.keys)
            widen(
                load_long(d + AT.exact_value) + place * value_dim * size,
                count * value_dim,
                work + at.values,
            )
            see_tokens(
                work,
                count,
                first,
                load_long(d + AT.num_exact) - 1,
                load_long(d + AT.num_exact),
                valid,
            )

    @procedure
    def attend_head(d: int, work: int, head: int, low: int, high: int) -> None:
        """Does [low, high) of the extent of a head."""
        scale = load_float(d + AT.scaling) * factor
        for i in range(groups * key_dim):
            asked = load_float(load_long(d + AT.query) + (head * groups * key_dim + i) * 4)
            store_float(work + at.query + i * 4, asked * scale)
        store_long(work + at.visible, load_long(load_long(d + AT.visible) + head * 8))
        is_open = (
            low == 0
            and load_byte(load_long(d + AT.open_valid) + head // load_long(d + AT.kv_heads)) != 0
        )
        key = load_long(d + AT.open_key) + head * key_dim * 4 if is_open else 0
        begin(work, 0, key, load_long(d + AT.open_value) + head * value_dim * 4)
        if low == 0:
            see_exact(d, work, head)
        first, last = max(low - OWN, 0), max(high - OWN, 0)
        see_entries(
            work,
            load_long(d + AT.pages),
            load_long(d + AT.table) + head * load_long(d + AT.columns) * 4,
            first,
            last,
        )

    @compiled
    def keep(d: int, work: int, head: int, thread: int) -> None:
        """Puts what a thread found of a head to its parts."""
        heads = load_long(d + AT.requests) * load_long(d + AT.kv_heads)
        for g in range(groups):
            part = load_long(d + AT.parts) + ((thread * heads + head) * groups + g) * part_size * 4
            total = np.float32(0.0)
            for lane in range(LANES):
                total += load_float(work + at.total + (g * LANES + lane) * 4)
            store_float(part, load_float(work + at.top + g * 4))
            store_float(part + 4, total)
            copy(work + at.sums + g * value_dim * 4, value_dim, part + 8)

    @procedure
    def attend_share(d: int, thread: int) -> None:
        heads, whole = load_long(d + AT.requests) * load_long(d + AT.kv_heads), 0
        for head in range(heads):
            whole += extent(d, head)
        low, high = (
            thread * whole // load_long(d + AT.threads),
            (thread + 1) * whole // load_long(d + AT.threads),
        )
        work, start = load_long(d + AT.work) + thread * load_long(d + AT.work_nbytes), 0
        for head in range(heads):
            here = extent(d, head)
            first, last = max(low - start, 0), min(high - start, here)
            if first < last:
                attend_head(d, work, head, first, last)
                keep(d, work, head, thread)
            start += here

    @procedure
    def join_head(d: int, head: int, low: int, high: int) -> None:
        """Joins the parts of a head by the threads [low, high)."""
        heads, work = (
            load_long(d + AT.requests) * load_long(d + AT.kv_heads),
            load_long(d + AT.work),
        )
        for g in range(groups):
            first = load_long(d + AT.parts) + (head * groups + g) * part_size * 4
            step = heads * groups * part_size * 4
            top = load_float(first + low * step)
            for thread in range(low + 1, high):
                top = max(top, load_float(first + thread * step))
            total = np.float32(0.0)
            for thread in range(low, high):
                part = first + thread * step
                share = np.exp2(max(load_float(part) - top, np.float32(-126.0)))
                total += share * load_float(part + 4)
                for i in range(value_dim):
                    sofar = load_float(work + i * 4) if thread > low else np.float32(0.0)
                    store_float(work + i * 4, sofar + share * load_float(part + 8 + i * 4))
            inverse = np.float32(1.0) / total if total > 0 else np.float32(0.0)
            for i in range(value_dim):
                store_float(work + i * 4, load_float(work + i * 4) * inverse)
            narrow(work, value_dim, load_long(d + AT.out) + (head * groups + g) * value_dim * size)

    @procedure
    def join(d: int, _: int) -> None:
        heads, whole, start = load_long(d + AT.requests) * load_long(d + AT.kv_heads), 0, 0
        for head in range(heads):
            whole += extent(d, head)
        low = 0
        for head in range(heads):
            end = start + extent(d, head)
            while (low + 1) * whole // load_long(d + AT.threads) <= start:
                low += 1
            high = low
            while (
                high < load_long(d + AT.threads) and high * whole // load_long(d + AT.threads) < end
            ):
                high += 1
            join_head(d, head, low, high)
            start = end

    return attend_share, join
