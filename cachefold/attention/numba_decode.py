"""Decode attention on the CPU: one query position per request over its ragged pages.

All strips of all requests and heads are split evenly over the threads (split-K), so that heads
of any length keep every core busy; a second pass joins the parts of a head.

Legend: B requests, K kv heads, H query heads, D key dim, Dv value dim, R rotary dim, N exact
tokens, C columns of the block table.
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
    item,
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
from cachefold.attention.vectors import HIDDEN, LANES, make_copies, make_rotate

OWN = 2
"""Work of a head besides its entries (ring, open entry), in strips."""


class Decode(NamedTuple):
    """Addresses, then sizes. What only a step has is 0 for a `PagedCall`, which comes rotated."""

    query: int
    """(B, H, D)"""
    open_key: int
    """(B, K, D), in a step float32"""
    open_value: int
    """(B, K, Dv), in a step float32"""
    open_valid: int
    """(B,) bool"""
    open_bias: int
    """(B, K) float32, 0 = none"""
    exact_key: int
    """(B, K, N, D)"""
    exact_value: int
    """(B, K, N, Dv)"""
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
    query_cos: int = 0
    """(B or 1, R), of a step like all cos and sin"""
    query_sin: int = 0
    open_cos: int = 0
    """(B, R)"""
    open_sin: int = 0
    exact_cos: int = 0
    """(B, N, R)"""
    exact_sin: int = 0
    factors: int = 0
    """(D,) float32, of a step"""
    turn: int = 0
    """int64, of a step with a ring: which slot is the oldest; moved on in the end."""
    query_stride: int = 0
    """Bytes between the cos of one request and the next for the queries; 0 = shared."""


AT = offsets(Decode)


@functools.cache
def make_decode(shape: Shape, rotary: int) -> tuple[Any, Any]:
    """Two procedures of (fields of Decode, thread): each thread its share, then one joins.

    Args:
        shape: of the kernels.
        rotary: R of a step, whose queries and keys are not rotated yet; 0 for a `PagedCall`.
    """
    groups, key_dim, value_dim = shape.groups, shape.key_dim, shape.value_dim
    size, at = 2 if shape.half else 4, make_work(shape, groups)
    part_bytes, rotary_bytes = (value_dim + 2) * 4, rotary * size
    factor, biased = np.float32(1.0 if shape.softcap else LOG2_E), shape.biased
    begin, see_entries, see_tokens, inverse = make_passes(shape, groups)
    plain, copies = make_copies(False), make_copies(shape.half)
    copy, widen, narrow = plain.widen, copies.widen, copies.narrow
    rotate = make_rotate(key_dim, rotary, shape.half, shape.half)
    rotate_open = make_rotate(key_dim, rotary, shape.half, False)
    read_open, open_size = (copy, 4) if rotary else (widen, size)

    @compiled
    def extent(d: int, head: int) -> int:
        return OWN + -(-load_long(item(d, AT.visible, head * 8)) // LANES)

    @compiled
    def whole_extent(d: int) -> int:
        whole = 0
        for head in range(load_long(d + AT.requests) * load_long(d + AT.kv_heads)):
            whole += extent(d, head)
        return whole

    @compiled
    def ask(d: int, work: int, head: int, request: int) -> None:
        query, place = work + at.query, head * groups * key_dim
        if rotary:
            shared = request * load_long(d + AT.query_stride)
            cos, sin = item(d, AT.query_cos, shared), item(d, AT.query_sin, shared)
            for g in range(groups):
                source = item(d, AT.query, (place + g * key_dim) * size)
                rotate(source, cos, sin, load_long(d + AT.factors), query + g * key_dim * 4)
        else:
            widen(item(d, AT.query, place * size), groups * key_dim, query)
        scale = load_float(d + AT.scaling) * factor
        for i in range(groups * key_dim):
            store_float(query + i * 4, load_float(query + i * 4) * scale)
        store_long(work + at.visible, load_long(item(d, AT.visible, head * 8)))

    @compiled
    def see_open(d: int, work: int, head: int, request: int) -> None:
        """The open entry, which opens the softmax as well; nothing of it if there is none."""
        key, source = 0, item(d, AT.open_key, head * key_dim * open_size)
        if load_byte(item(d, AT.open_valid, request)) != 0:
            key = work + at.keys
            if rotary:
                cos = item(d, AT.open_cos, request * rotary_bytes)
                sin = item(d, AT.open_sin, request * rotary_bytes)
                rotate_open(source, cos, sin, load_long(d + AT.factors), key)
            else:
                widen(source, key_dim, key)
            value = item(d, AT.open_value, head * value_dim * open_size)
            read_open(value, value_dim, work + at.values)
        bias = item(d, AT.open_bias, head * 4) if biased else 0
        begin(work, 0, key, work + at.values, bias)

    @compiled
    def read_keys(d: int, work: int, head: int, request: int, first: int, count: int) -> None:
        total = load_long(d + AT.num_exact)
        source = item(d, AT.exact_key, (head * total + first) * key_dim * size)
        if rotary:
            for token in range(count):
                place = (request * total + first + token) * rotary_bytes
                cos, sin = item(d, AT.exact_cos, place), item(d, AT.exact_sin, place)
                target = work + at.keys + token * key_dim * 4
                key = source + token * key_dim * size
                rotate(key, cos, sin, load_long(d + AT.factors), target)
        else:
            widen(source, count * key_dim, work + at.keys)

    @compiled
    def see_exact(d: int, work: int, head: int, request: int) -> None:
        total = load_long(d + AT.num_exact)
        valid = item(d, AT.exact_valid, request * total)
        for first in range(0, total, BLOCK * LANES):
            count = min(BLOCK * LANES, total - first)
            read_keys(d, work, head, request, first, count)
            values = item(d, AT.exact_value, (head * total + first) * value_dim * size)
            widen(values, count * value_dim, work + at.values)
            see_tokens(work, count, first, total - 1, total, valid)

    @procedure
    def attend_head(d: int, work: int, head: int, low: int, high: int) -> None:
        """Does [low, high) of the extent of a head."""
        request = head // load_long(d + AT.kv_heads)
        ask(d, work, head, request)
        if low == 0:
            see_open(d, work, head, request)
            see_exact(d, work, head, request)
        else:
            begin(work, 0, 0, work, 0)
        table = item(d, AT.table, head * load_long(d + AT.columns) * 4)
        first, last = max(low - OWN, 0), max(high - OWN, 0)
        see_entries(work, load_long(d + AT.pages), table, first, last)

    @compiled
    def part_of(d: int, thread: int, row: int) -> int:
        """Where a thread puts what it found for a query head."""
        rows = load_long(d + AT.requests) * load_long(d + AT.kv_heads) * groups
        return item(d, AT.parts, (thread * rows + row) * part_bytes)

    @compiled
    def keep(d: int, work: int, head: int, thread: int) -> None:
        """Puts what a thread found of a head to its parts."""
        for g in range(groups):
            part, total = part_of(d, thread, head * groups + g), np.float32(0.0)
            for lane in range(LANES):
                total += load_float(work + at.total + (g * LANES + lane) * 4)
            store_float(part, load_float(work + at.top + g * 4))
            store_float(part + 4, total)
            copy(work + at.sums + g * value_dim * 4, value_dim, part + 8)

    @compiled
    def finish(d: int, work: int, head: int) -> None:
        """Writes the output of a head that one thread did whole."""
        for g in range(groups):
            sums, share = work + at.sums + g * value_dim * 4, inverse(work, g)
            for i in range(value_dim):
                store_float(sums + i * 4, load_float(sums + i * 4) * share)
            narrow(sums, value_dim, item(d, AT.out, (head * groups + g) * value_dim * size))

    @procedure
    def attend_share(d: int, thread: int) -> None:
        whole, threads = whole_extent(d), load_long(d + AT.threads)
        low, high = thread * whole // threads, (thread + 1) * whole // threads
        work, start = item(d, AT.work, thread * load_long(d + AT.work_nbytes)), 0
        for head in range(load_long(d + AT.requests) * load_long(d + AT.kv_heads)):
            here = extent(d, head)
            first, last = max(low - start, 0), min(high - start, here)
            if first < last:
                attend_head(d, work, head, first, last)
                if last - first == here:
                    finish(d, work, head)
                else:
                    keep(d, work, head, thread)
            start += here

    @compiled
    def join_row(d: int, row: int, low: int, high: int) -> None:
        """Joins the parts of a query head by the threads [low, high)."""
        sums, top, total = load_long(d + AT.work), np.float32(HIDDEN), np.float32(0.0)
        for thread in range(low, high):
            top = max(top, load_float(part_of(d, thread, row)))
        for i in range(value_dim):
            store_float(sums + i * 4, np.float32(0.0))
        for thread in range(low, high):
            part = part_of(d, thread, row)
            share = np.exp2(max(load_float(part) - top, np.float32(-126.0)))
            total += share * load_float(part + 4)
            for i in range(value_dim):
                found = share * load_float(part + 8 + i * 4)
                store_float(sums + i * 4, load_float(sums + i * 4) + found)
        inverse = np.float32(1.0) / total if total > 0 else np.float32(0.0)
        for i in range(value_dim):
            store_float(sums + i * 4, load_float(sums + i * 4) * inverse)
        narrow(sums, value_dim, item(d, AT.out, row * value_dim * size))

    @procedure
    def join(d: int, _: int) -> None:
        whole, threads = whole_extent(d), load_long(d + AT.threads)
        low, start = 0, 0
        for head in range(load_long(d + AT.requests) * load_long(d + AT.kv_heads)):
            end = start + extent(d, head)
            while (low + 1) * whole // threads <= start:
                low += 1
            high = low + 1
            while high < threads and high * whole // threads < end:
                high += 1
            for g in range(groups if high - low > 1 else 0):
                join_row(d, head * groups + g, low, high)
            start = end
        turn = load_long(d + AT.turn)
        if turn:
            store_long(turn, (load_long(turn) + 1) % load_long(d + AT.num_exact))

    return attend_share, join
