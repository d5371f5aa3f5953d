"""Folds one token per request on the CPU and rotates what decode attention asks for.

The same as `reference.fold`, in place, in one pass over requests and heads.

Legend: B requests, K kv heads, G query heads per kv head, D key dim, Dv value dim, R rotary dim,
w delay, C columns of the block table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import njit, prange

from cachefold.attention.numba_kernels import (
    Shape,
    compiled,
    load_byte,
    load_float,
    load_int,
    load_long,
    store_byte,
    store_float,
    store_long,
)
from cachefold.attention.vectors import make_blend, make_copies, make_rotate


class Run(NamedTuple):
    """Addresses of the fields of `Tokens`."""

    key: int
    value: int
    cos: int
    sin: int
    alpha: int
    omega: int
    valid: int


class Fold(NamedTuple):
    """Addresses, then sizes. The runs follow as arguments of their own."""

    query: int
    """(B, H, D) of the model"""
    query_factors: int
    """(D,) float32"""
    key_factors: int
    """(D,) float32"""
    turn: int
    """int64"""
    pages: int
    table: int
    """(B, K, C) int32"""
    lengths: int
    """(B, K) int64"""
    rotated_query: int
    """(B, H, D) float32, written"""
    rotated_open: int
    """(B, K, D) float32, written"""
    rotated_ring: int
    """(B, K, w, D) float32, written"""
    scratch: int
    """(B, D + Dv) float32"""
    requests: int
    kv_heads: int
    delay: int
    columns: int
    new_rotary: int
    """Bytes between the cos of one request and the next among the new tokens; 0 = shared."""


class FoldKernels(NamedTuple):
    """Numba functions of (Fold, new, ring, tail)."""

    serial: Any
    parallel: Any


@functools.cache
def make_fold(shape: Shape, rotary: int) -> FoldKernels:
    """Kernels for R = `rotary`, a multiple of 32."""
    groups, key_dim, value_dim = shape.groups, shape.key_dim, shape.value_dim
    size, page_size = 2 if shape.half else 4, shape.page_size
    key_bytes = page_size * key_dim * size
    page_bytes = key_bytes + page_size * value_dim * size
    widen, narrow, scatter = make_copies(shape.half)
    rotate = make_rotate(key_dim, rotary, shape.half, shape.half)
    rotate_wide = make_rotate(key_dim, rotary, shape.half, False)
    blend = make_blend(shape.half)

    @compiled
    def close(f: Fold, tail: Run, head: int, request: int, scratch: int) -> None:
        """Writes the open entry to the next free slot of its head."""
        length = load_long(f.lengths + head * 8)
        page = load_int(f.table + (head * f.columns + length // page_size) * 4)
        slot, start = length % page_size, f.pages + page * page_bytes
        cos, sin = tail.cos + request * rotary * size, tail.sin + request * rotary * size
        rotate_wide(tail.key + head * key_dim * 4, cos, sin, f.key_factors, scratch)
        scatter(scratch, key_dim, start + slot * size, page_size * size)
        value = start + key_bytes + slot * value_dim * size
        narrow(tail.value + head * value_dim * 4, value_dim, value)
        store_long(f.lengths + head * 8, length + 1)

    @compiled
    def absorb(
        tail: Run, head: int, key: int, value: int, omega: float, merges: bool, scratch: int
    ) -> None:
        """Merges a token into the open entry, or makes it the open entry."""
        mean_key, mean_value = tail.key + head * key_dim * 4, tail.value + head * value_dim * 4
        if not merges:
            widen(key, key_dim, mean_key)
            widen(value, value_dim, mean_value)
            store_float(tail.omega + head * 4, omega)
            return
        weight = load_float(tail.omega + head * 4) + omega
        store_float(tail.omega + head * 4, weight)
        store_float(scratch, omega / weight)
        blend(key, key_dim, scratch, mean_key)
        blend(value, value_dim, scratch, mean_value)

    @compiled
    def fold_head(f: Fold, leaving: Run, tail: Run, head: int, slot: int, request: int) -> None:
        """Carries out the decision of the token at `slot` of `leaving`."""
        scratch = f.scratch + request * (key_dim + value_dim) * 4
        exists = load_byte(tail.valid + request) != 0
        rotary_slot = request * max(f.delay, 1) + slot
        is_real = load_byte(leaving.valid + rotary_slot) != 0
        place = head * max(f.delay, 1) + slot
        merges = exists and is_real and load_float(leaving.alpha + place * 4) > 0.5
        if exists and not merges:
            close(f, tail, head, request, scratch)
        key, value = leaving.key + place * key_dim * size, leaving.value + place * value_dim * size
        omega = load_float(leaving.omega + place * 4)
        absorb(tail, head, key, value, omega, merges, scratch)

    @compiled
    def copy(source: int, count: int, target: int, scratch: int) -> None:
        widen(source, count, scratch)
        narrow(scratch, count, target)

    @compiled
    def enter_head(f: Fold, new: Run, ring: Run, head: int, slot: int, request: int) -> None:
        """Puts the new token of a head into the ring."""
        scratch = f.scratch + request * (key_dim + value_dim) * 4
        place = head * f.delay + slot
        copy(new.key + head * key_dim * size, key_dim, ring.key + place * key_dim * size, scratch)
        value = ring.value + place * value_dim * size
        copy(new.value + head * value_dim * size, value_dim, value, scratch)
        store_float(ring.alpha + place * 4, load_float(new.alpha + head * 4))
        store_float(ring.omega + place * 4, load_float(new.omega + head * 4))

    @compiled
    def move_rotary(
        f: Fold, source: Run, slot: int, source_stride: int, target: Run, to: int, request: int
    ) -> None:
        """Copies cos, sin and valid of a request from `slot` to `to`, counted in tokens."""
        scratch = f.scratch + request * (key_dim + value_dim) * 4
        start = request * source_stride + slot * rotary * size
        copy(source.cos + start, rotary, target.cos + to * rotary * size, scratch)
        copy(source.sin + start, rotary, target.sin + to * rotary * size, scratch)

    @compiled
    def turn_all(f: Fold, new: Run, ring: Run, tail: Run, request: int) -> None:
        """Rotates queries, open entries and ring of a request."""
        cos, sin = new.cos + request * f.new_rotary, new.sin + request * f.new_rotary
        first, open_place = request * f.kv_heads * groups, request * rotary * size
        for row in range(first, first + f.kv_heads * groups):
            target = f.rotated_query + row * key_dim * 4
            rotate(f.query + row * key_dim * size, cos, sin, f.query_factors, target)
        for head in range(request * f.kv_heads, (request + 1) * f.kv_heads):
            cos, sin = tail.cos + open_place, tail.sin + open_place
            target = f.rotated_open + head * key_dim * 4
            rotate_wide(tail.key + head * key_dim * 4, cos, sin, f.key_factors, target)
            for token in range(f.delay):
                place = head * f.delay + token
                turned = (request * f.delay + token) * rotary * size
                target = f.rotated_ring + place * key_dim * 4
                key = ring.key + place * key_dim * size
                rotate(key, ring.cos + turned, ring.sin + turned, f.key_factors, target)

    @compiled
    def fold_request(f: Fold, new: Run, ring: Run, tail: Run, request: int) -> None:
        slot = load_long(f.turn) if f.delay else 0
        leaving = ring if f.delay else new
        stride = f.delay * rotary * size if f.delay else f.new_rotary
        for head in range(request * f.kv_heads, (request + 1) * f.kv_heads):
            fold_head(f, leaving, tail, head, slot, request)
            if f.delay:
                enter_head(f, new, ring, head, slot, request)
        move_rotary(f, leaving, slot, stride, tail, request, request)
        from_slot = request * max(f.delay, 1) + slot
        store_byte(tail.valid + request, load_byte(leaving.valid + from_slot))
        if f.delay:
            move_rotary(f, new, 0, f.new_rotary, ring, request * f.delay + slot, request)
            store_byte(ring.valid + request * f.delay + slot, load_byte(new.valid + request))
        turn_all(f, new, ring, tail, request)

    @compiled
    def finish(f: Fold) -> None:
        if f.delay:
            store_long(f.turn, (load_long(f.turn) + 1) % f.delay)

    @compiled
    def serial(f: Fold, new: Run, ring: Run, tail: Run) -> None:
        for request in range(f.requests):
            fold_request(f, new, ring, tail, request)
        finish(f)

    @njit(nogil=True, error_model="numpy", parallel=True)
    def parallel(f: Fold, new: Run, ring: Run, tail: Run) -> None:
        for request in prange(f.requests):
            fold_request(f, new, ring, tail, request)
        finish(f)

    return FoldKernels(serial, parallel)
