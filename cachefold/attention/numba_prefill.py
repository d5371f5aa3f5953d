"""Prefill attention on the CPU: passes of a few query positions over the pages.

Cost Q x S, memory O(Q). Threads take passes in turn, because later ones see more.

Legend: B requests, K kv heads, H query heads, G query heads per kv head, D key dim, Dv value dim,
Q queries, N exact tokens, C columns of the block table, w delay.
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
from cachefold.attention.vectors import LANES, make_copies

MAX_ROWS = 12
"""Rows of a pass: their scores fit into registers together."""


class Prefill(NamedTuple):
    """Addresses, then sizes; all numbers of the model but `visible`. Rotated as in PagedCall."""

    query: int
    """(B, H, Q, D)"""
    open_key: int
    """(B, K, Q, D)"""
    open_value: int
    """(B, K, Q, Dv)"""
    open_valid: int
    """(B, Q) bool"""
    open_bias: int
    """(B, K, Q) float32, 0 = none"""
    exact_key: int
    """(B, K, N, D)"""
    exact_value: int
    """(B, K, N, Dv)"""
    exact_valid: int
    """(B, N) bool"""
    visible: int
    """(B, K, Q) int64"""
    pages: int
    table: int
    """(B, K, C) int32"""
    work: int
    """Scratch of every thread."""
    work_nbytes: int
    """Of one thread."""
    out: int
    """(B, H, Q, Dv)"""
    requests: int
    kv_heads: int
    num_queries: int
    num_exact: int
    columns: int
    delay: int
    threads: int
    scaling: int
    """Bits of the float32."""


AT = offsets(Prefill)


def positions_per_pass(shape: Shape) -> int:
    """Query positions that go over the entries together."""
    return max(1, MAX_ROWS // shape.groups)


@functools.cache
def make_prefill(shape: Shape) -> Any:
    """A procedure of (fields of Prefill, thread)."""
    groups, key_dim, value_dim = shape.groups, shape.key_dim, shape.value_dim
    positions, size = positions_per_pass(shape), 2 if shape.half else 4
    rows = positions * groups
    at, factor = make_work(shape, rows), np.float32(1.0 if shape.softcap else LOG2_E)
    biased = shape.biased
    begin, see_entries, see_tokens, inverse = make_passes(shape, rows)
    copies = make_copies(shape.half)
    widen, narrow = copies.widen, copies.narrow

    @compiled
    def place(p: int, head: int, row: int, first: int, dim: int) -> int:
        """Where the numbers of a row are in (B, H, Q, dim), in bytes."""
        query_head = head * groups + row % groups
        return (query_head * load_long(p + AT.num_queries) + first + row // groups) * dim * size

    @compiled
    def ask(p: int, work: int, head: int, first: int, count: int) -> None:
        """Reads `count` positions from `first` on; what lacks to a whole pass sees nothing."""
        query, scale = work + at.query, load_float(p + AT.scaling) * factor
        for row in range(count * groups):
            source = item(p, AT.query, place(p, head, row, first, key_dim))
            widen(source, key_dim, query + row * key_dim * 4)
        for i in range(rows * key_dim):
            asked = load_float(query + i * 4) * scale
            store_float(query + i * 4, asked if i < count * groups * key_dim else np.float32(0.0))
        seen = item(p, AT.visible, (head * load_long(p + AT.num_queries) + first) * 8)
        for position in range(positions):
            # Those that lack count as the last, so that the counts never fall.
            here = load_long(seen + min(position, count - 1) * 8)
            store_long(work + at.visible + position * 8, here)

    @compiled
    def open_entries(p: int, work: int, head: int, first: int, count: int) -> None:
        total, request = load_long(p + AT.num_queries), head // load_long(p + AT.kv_heads)
        for position in range(positions):
            here, key = head * total + first + position, 0
            valid = item(p, AT.open_valid, request * total + first + position)
            if position < count and load_byte(valid) != 0:
                key = work + at.keys
                widen(item(p, AT.open_key, here * key_dim * size), key_dim, key)
                value = item(p, AT.open_value, here * value_dim * size)
                widen(value, value_dim, work + at.values)
            bias = item(p, AT.open_bias, here * 4) if key and biased else 0
            begin(work, position, key, work + at.values, bias)

    @compiled
    def see_exact(p: int, work: int, head: int, first: int, count: int) -> None:
        total, delay = load_long(p + AT.num_exact), load_long(p + AT.delay)
        row = total - load_long(p + AT.num_queries) + first
        start, end = max(row - delay + 1, 0), row + count
        valid = item(p, AT.exact_valid, head // load_long(p + AT.kv_heads) * total)
        for token in range(start if delay else end, end, BLOCK * LANES):
            number, here = min(BLOCK * LANES, end - token), head * total + token
            keys = item(p, AT.exact_key, here * key_dim * size)
            values = item(p, AT.exact_value, here * value_dim * size)
            widen(keys, number * key_dim, work + at.keys)
            widen(values, number * value_dim, work + at.values)
            see_tokens(work, number, token, row, delay, valid)

    @compiled
    def attend_pass(p: int, work: int, head: int, first: int) -> None:
        count = min(positions, load_long(p + AT.num_queries) - first)
        ask(p, work, head, first, count)
        open_entries(p, work, head, first, count)
        see_exact(p, work, head, first, count)
        most = load_long(work + at.visible + (positions - 1) * 8)
        table = item(p, AT.table, head * load_long(p + AT.columns) * 4)
        see_entries(work, load_long(p + AT.pages), table, 0, -(-most // LANES))
        for row in range(count * groups):
            sums, share = work + at.sums + row * value_dim * 4, inverse(work, row)
            for i in range(value_dim):
                store_float(sums + i * 4, load_float(sums + i * 4) * share)
            narrow(sums, value_dim, item(p, AT.out, place(p, head, row, first, value_dim)))

    @procedure
    def attend(p: int, thread: int) -> None:
        per_head = -(-load_long(p + AT.num_queries) // positions)
        tasks = load_long(p + AT.requests) * load_long(p + AT.kv_heads) * per_head
        work = item(p, AT.work, thread * load_long(p + AT.work_nbytes))
        for task in range(thread, tasks, load_long(p + AT.threads)):
            attend_pass(p, work, task // per_head, task % per_head * positions)

    return attend
