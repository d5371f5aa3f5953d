"""Folds one token per request on the CPU.

The same as `reference.fold`, in place, in one pass over requests and heads.

Legend: B requests, K kv heads, D key dim, Dv value dim, R rotary dim,
w delay, C columns of the block table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from cachefold.attention.numba_kernels import (
    Shape,
    compiled,
    item,
    load_byte,
    load_float,
    load_int,
    load_long,
    offsets,
    procedure,
    store_byte,
    store_float,
    store_long,
)
from cachefold.attention.vectors import make_blend, make_copies, make_rotate


class Fold(NamedTuple):
    """Addresses, then sizes; those of new, ring and tail are the fields of `Tokens`."""

    new_key: int
    new_value: int
    new_cos: int
    new_sin: int
    new_alpha: int
    new_omega: int
    new_valid: int
    new_size: int
    ring_key: int
    ring_value: int
    ring_cos: int
    ring_sin: int
    ring_alpha: int
    ring_omega: int
    ring_valid: int
    ring_size: int
    tail_key: int
    tail_value: int
    tail_cos: int
    tail_sin: int
    tail_alpha: int
    tail_omega: int
    tail_valid: int
    tail_size: int
    factors: int
    """(D,) float32"""
    size_weight: int
    """(K,) float32, 0 = none; there are no sizes then."""
    open_bias: int
    """(B, K) float32, what the scores of the open entries rise by once all is folded; 0 = none."""
    turn: int
    """int64; the join after decoding moves it on."""
    pages: int
    table: int
    """(B, K, C) int32"""
    lengths: int
    """(B, K) int64"""
    scratch: int
    """(B, D + Dv) float32"""
    requests: int
    columns: int
    new_stride: int
    """Bytes between the cos of one request and the next among the new tokens; 0 = shared."""
    threads: int


AT = offsets(Fold)
NEW, RING, TAIL = AT.new_key, AT.ring_key, AT.tail_key
"""Where the fields of a run begin."""
KEY, VALUE, COS, SIN, ALPHA, OMEGA, VALID, SIZE = range(0, 64, 8)


@functools.cache
def make_fold(shape: Shape, rotary: int, kv_heads: int, delay: int) -> Any:
    """A procedure of (fields of Fold, thread) for R = `rotary`, a multiple of 32."""
    key_dim, value_dim = shape.key_dim, shape.value_dim
    size, page_size = 2 if shape.half else 4, shape.page_size
    biased, entry_dim = shape.biased, key_dim + shape.biased
    key_bytes = page_size * entry_dim * size
    page_bytes = key_bytes + page_size * value_dim * size
    rotary_bytes, scratch_bytes = rotary * size, (key_dim + value_dim) * 4
    # Without a ring the token that leaves is the new one itself.
    leaves, slots = (RING, delay) if delay else (NEW, 1)
    widen, narrow, scatter = make_copies(shape.half)
    rotate_wide = make_rotate(key_dim, rotary, shape.half, False)
    blend = make_blend(shape.half)

    @compiled
    def scratch_of(f: int, request: int) -> int:
        return item(f, AT.scratch, request * scratch_bytes)

    @compiled
    def bias_of(f: int, head: int) -> np.float32:
        """What the score of the open entry rises by."""
        weight = load_float(item(f, AT.size_weight, head % kv_heads * 4))
        return weight * np.log(load_float(item(f, TAIL + SIZE, head * 4)))

    @compiled
    def close(f: int, head: int, request: int) -> None:
        """Writes the open entry to the next free slot of its head."""
        length = load_long(item(f, AT.lengths, head * 8))
        column = head * load_long(f + AT.columns) + length // page_size
        page = load_int(item(f, AT.table, column * 4))
        slot, start = length % page_size, item(f, AT.pages, page * page_bytes)
        cos = item(f, TAIL + COS, request * rotary_bytes)
        sin = item(f, TAIL + SIN, request * rotary_bytes)
        mean, turned = item(f, TAIL + KEY, head * key_dim * 4), scratch_of(f, request)
        rotate_wide(mean, cos, sin, load_long(f + AT.factors), turned)
        if biased:  # one channel more
            store_float(turned + key_dim * 4, bias_of(f, head))
        scatter(turned, entry_dim, start + slot * size, page_size * size)
        value = start + key_bytes + slot * value_dim * size
        narrow(item(f, TAIL + VALUE, head * value_dim * 4), value_dim, value)
        store_long(item(f, AT.lengths, head * 8), length + 1)

    @compiled
    def absorb(f: int, head: int, request: int, slot: int, merges: bool) -> None:
        """Merges the token that leaves into the open entry, or makes it the open entry."""
        place = head * slots + slot
        key = item(f, leaves + KEY, place * key_dim * size)
        value = item(f, leaves + VALUE, place * value_dim * size)
        mean_key = item(f, TAIL + KEY, head * key_dim * 4)
        mean_value = item(f, TAIL + VALUE, head * value_dim * 4)
        weight, omega = item(f, TAIL + OMEGA, head * 4), item(f, leaves + OMEGA, place * 4)
        if biased:
            merged, one = item(f, TAIL + SIZE, head * 4), item(f, leaves + SIZE, place * 4)
            before = load_float(merged) if merges else np.float32(0.0)
            store_float(merged, before + load_float(one))
            store_float(item(f, AT.open_bias, head * 4), bias_of(f, head))
        if not merges:
            widen(key, key_dim, mean_key)
            widen(value, value_dim, mean_value)
            store_float(weight, load_float(omega))
            return
        store_float(weight, load_float(weight) + load_float(omega))
        share = scratch_of(f, request)
        store_float(share, load_float(omega) / load_float(weight))
        blend(key, key_dim, share, mean_key)
        blend(value, value_dim, share, mean_value)

    @compiled
    def fold_head(f: int, head: int, request: int, slot: int) -> None:
        """Carries out the decision of the token at `slot`."""
        exists = load_byte(item(f, TAIL + VALID, request)) != 0
        is_real = load_byte(item(f, leaves + VALID, request * slots + slot)) != 0
        alpha = load_float(item(f, leaves + ALPHA, (head * slots + slot) * 4))
        merges = exists and is_real and alpha > 0.5
        if exists and not merges:
            close(f, head, request)
        absorb(f, head, request, slot, merges)

    @compiled
    def copy(source: int, count: int, target: int, scratch: int) -> None:
        widen(source, count, scratch)
        narrow(scratch, count, target)

    @compiled
    def enter_number(f: int, field: int, head: int, place: int) -> None:
        store_float(item(f, RING + field, place * 4), load_float(item(f, NEW + field, head * 4)))

    @compiled
    def enter_head(f: int, head: int, request: int, slot: int) -> None:
        """Puts the new token of a head into the ring."""
        scratch, place = scratch_of(f, request), head * delay + slot
        source, target = head * key_dim * size, place * key_dim * size
        copy(item(f, NEW + KEY, source), key_dim, item(f, RING + KEY, target), scratch)
        source, target = head * value_dim * size, place * value_dim * size
        copy(item(f, NEW + VALUE, source), value_dim, item(f, RING + VALUE, target), scratch)
        enter_number(f, ALPHA, head, place)
        enter_number(f, OMEGA, head, place)
        if biased:
            enter_number(f, SIZE, head, place)

    @compiled
    def move(f: int, source: int, start: int, target: int, to: int, request: int) -> None:
        """Copies cos and sin of a token between runs, from and to places in bytes."""
        scratch = scratch_of(f, request)
        for field in (COS, SIN):
            copy(item(f, source + field, start), rotary, item(f, target + field, to), scratch)

    @compiled
    def enter_request(f: int, request: int, slot: int) -> None:
        """Carries on what all heads of a request share."""
        shared, place = request * load_long(f + AT.new_stride), request * slots + slot
        start = place * rotary_bytes if delay else shared
        move(f, leaves, start, TAIL, request * rotary_bytes, request)
        valid = load_byte(item(f, leaves + VALID, place))
        store_byte(item(f, TAIL + VALID, request), valid)
        if delay:
            move(f, NEW, shared, RING, place * rotary_bytes, request)
            store_byte(item(f, RING + VALID, place), load_byte(item(f, NEW + VALID, request)))

    @procedure
    def fold(f: int, thread: int) -> None:
        slot, threads = load_long(load_long(f + AT.turn)), load_long(f + AT.threads)
        for request in range(thread, load_long(f + AT.requests), threads):
            for head in range(request * kv_heads, (request + 1) * kv_heads):
                fold_head(f, head, request, slot if delay else 0)
                if delay:
                    enter_head(f, head, request, slot)
            enter_request(f, request, slot if delay else 0)

    return fold
