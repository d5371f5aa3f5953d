"""Vector instructions for numba kernels: what numba's own loops can't be trusted to become.

The one place that writes LLVM code. Vectors of 16 float32 are LLVM's own type, so the same code
becomes AVX-512, two AVX2 or four NEON instructions. Addresses and sizes are int64; a number is
float32, or bfloat16 widened on load. tests/attention/test_vectors.py checks each against numpy.

Legend: R rows (queries that share keys), D key dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
HIDDEN = -1e30
"""Score of a column that is not seen; what is at most half of it gets weight 0."""

_FLOAT, _BYTE = ir.FloatType(), ir.IntType(8)
_HALF, _INT, _LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOATS, _HALVES, _INTS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _HALF, _INT))
_TO_L2 = 2
"""Prefetch hint: entries go to the second cache; the first has no room for pages in flight."""
# exp2 on [-1/2, 1/2]: Taylor coefficients ln(2)^k / k!, error below 2e-7 of the result.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.055504109, 0.0096181291, 0.0013333558, 0.00015403530)

Builder = Any


def _const(value: float, kind: Any = _FLOATS) -> Any:
    return ir.Constant(kind, [value] * LANES)


def _long(value: int) -> Any:
    return ir.Constant(_LONG, value)


def _pointer(b: Builder, address: Any, kind: Any, offset: int = 0) -> Any:
    moved = b.add(address, _long(offset)) if offset else address
    return b.inttoptr(moved, kind.as_pointer())


def _load(b: Builder, address: Any, kind: Any, offset: int = 0) -> Any:
    loaded = b.load(_pointer(b, address, kind, offset))
    loaded.align = 2 if kind in (_HALF, _HALVES) else 4
    return loaded


def _store(b: Builder, value: Any, address: Any, offset: int = 0) -> None:
    b.store(value, _pointer(b, address, value.type, offset)).align = 2 if _is_half(value) else 4


def _is_half(value: Any) -> bool:
    return value.type in (_HALF, _HALVES)


def _load_wide(b: Builder, address: Any, offset: int, half: bool) -> Any:
    """16 numbers as float32."""
    if not half:
        return _load(b, address, _FLOATS, offset)
    bits = b.zext(_load(b, address, _HALVES, offset), _INTS)
    return b.bitcast(b.shl(bits, _const(16, _INTS)), _FLOATS)


def _splat(b: Builder, number: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = b.insert_element(nothing, number, ir.Constant(_INT, 0))
    return b.shuffle_vector(first, nothing, _const(0, _INTS))


def _splat_load(b: Builder, address: Any, offset: int = 0) -> Any:
    return _splat(b, _load(b, address, _FLOAT, offset))


def _llvm(b: Builder, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _fma(b: Builder, x: Any, y: Any, z: Any) -> Any:
    return _llvm(b, "llvm.fma.v16f32", _FLOATS, [x, y, z])


def _max(b: Builder, x: Any, y: Any) -> Any:
    return _llvm(b, "llvm.maxnum.v16f32", _FLOATS, [x, y])


def _exp2(b: Builder, x: Any) -> Any:
    """2^x for x <= 0; below 2^-126 the smallest normal number."""
    x = _max(b, x, _const(-126.0))
    whole = _llvm(b, "llvm.rint.v16f32", _FLOATS, [x])
    rest = b.fsub(x, whole)
    power = _const(_EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        power = _fma(b, power, rest, _const(coefficient))
    exponent = b.add(b.fptosi(whole, _INTS), _const(127, _INTS))
    return b.fmul(power, b.bitcast(b.shl(exponent, _const(23, _INTS)), _FLOATS))


def _prefetch(b: Builder, address: Any, index: Any, nbytes: int) -> None:
    """Asks for `nbytes` at address + index * nbytes."""
    start = b.add(address, b.mul(index, _long(nbytes)))
    for offset in range(0, nbytes, 64):
        flags = [ir.Constant(_INT, flag) for flag in (0, _TO_L2, 1)]
        arguments = [_pointer(b, start, _BYTE, offset), *flags]
        _llvm(b, "llvm.prefetch.p0", ir.VoidType(), arguments)


def _variables(b: Builder, values: list[Any]) -> list[Any]:
    """Stack slots, which LLVM turns into registers."""
    slots = [cgutils.alloca_once(b, _FLOATS) for _ in values]
    for slot, value in zip(slots, values, strict=True):
        b.store(value, slot)
    return slots


def _typed(emit: Callable[..., None], count: int) -> tuple[Any, Any]:
    """What an intrinsic of `count` int64 arguments returns to numba."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), codegen


def make_score(rows: int, dim: int, stride: int, half: bool, biased: bool = False) -> Any:
    """Scores of 16 entries: score(query, keys, out, out_stride, upcoming).

    Args:
        rows: R.
        dim: D, a multiple of 4.
        stride: entries between one channel and the next: the page size.
        half: keys are bfloat16.
        biased: a bias lies behind the keys, to be prefetched with them.

    Returns:
        A numba function of addresses: query (R, D) float32; keys (D, stride); out, whose row r
        begins at r * out_stride bytes and gets 16 float32; upcoming, keys to prefetch.
    """
    size, unroll = 2 if half else 4, 4
    ahead = unroll * LANES * size

    def emit(b: Builder, query: Any, keys: Any, out: Any, out_stride: Any, upcoming: Any) -> None:
        sums = _variables(b, [_const(0.0)] * rows)
        if biased:
            _prefetch(b, b.add(upcoming, _long(dim * stride * size)), _long(0), 64)
        with cgutils.for_range(b, _long(dim // unroll)) as loop:
            key = b.add(keys, b.mul(loop.index, _long(stride * size * unroll)))
            row = b.add(query, b.mul(loop.index, _long(4 * unroll)))
            _prefetch(b, upcoming, loop.index, ahead)
            for step in range(unroll):
                entries = _load_wide(b, key, step * stride * size, half)
                for r, total in enumerate(sums):
                    factor = _splat_load(b, row, (r * dim + step) * 4)
                    b.store(_fma(b, factor, entries, b.load(total)), total)
        for r, total in enumerate(sums):
            _store(b, b.load(total), b.add(out, b.mul(out_stride, _long(r))))

    @intrinsic
    def score(context, query, keys, out, out_stride, upcoming):  # type: ignore[no-untyped-def]
        return _typed(emit, 5)

    return score


def make_bias(rows: int, half: bool, factor: float) -> Any:
    """Adds to the scores of 16 entries: bias(source, scores, stride).

    Args:
        rows: R.
        half: the source is bfloat16, else float32.
        factor: on what is added.

    Returns:
        A numba function of addresses: source (16,); scores (R, 16) with rows `stride` bytes apart.
    """

    def emit(b: Builder, source: Any, scores: Any, stride: Any) -> None:
        extra = b.fmul(_load_wide(b, source, 0, half), _const(factor))
        for row in range(rows):
            place = b.add(scores, b.mul(stride, _long(row)))
            _store(b, b.fadd(_load(b, place, _FLOATS), extra), place)

    @intrinsic
    def bias(context, source, scores, stride):  # type: ignore[no-untyped-def]
        return _typed(emit, 3)

    return bias


def make_weigh(rows: int, dim: int, half: bool) -> Any:
    """Adds weighted values: weigh(weights, stride, values, count, sums, upcoming).

    Args:
        rows: R.
        dim: Dv, a multiple of 16.
        half: values are bfloat16.

    Returns:
        A numba function of addresses: weights, whose row r begins at r * stride bytes; values
        (count, Dv); sums (R, Dv) float32, in place; upcoming, values to prefetch.
    """
    size, chunks = 2 if half else 4, dim // LANES
    # So many sums stay in registers, of which AVX-512 has 32.
    group = max(1, 20 // rows)

    def emit_group(
        b: Builder, chosen: range, weights: Any, stride: Any, values: Any, count: Any, sums: Any,
        upcoming: Any,
    ) -> None:  # fmt: skip
        places = [(r, c) for r in range(rows) for c in chosen]
        offsets = [(r * dim + c * LANES) * 4 for r, c in places]
        held = _variables(b, [_load(b, sums, _FLOATS, offset) for offset in offsets])
        starts = [b.add(weights, b.mul(stride, _long(r))) for r in range(rows)]
        with cgutils.for_range(b, count) as loop:
            if not chosen.start:
                _prefetch(b, upcoming, loop.index, dim * size)
            value = b.add(values, b.mul(loop.index, _long(dim * size)))
            loaded = {c: _load_wide(b, value, c * LANES * size, half) for c in chosen}
            at = b.mul(loop.index, _long(4))
            factors = [_splat_load(b, b.add(start, at)) for start in starts]
            for (r, c), slot in zip(places, held, strict=True):
                b.store(_fma(b, factors[r], loaded[c], b.load(slot)), slot)
        for offset, slot in zip(offsets, held, strict=True):
            _store(b, b.load(slot), sums, offset)

    def emit(b: Builder, *arguments: Any) -> None:
        for start in range(0, chunks, group):
            emit_group(b, range(start, min(start + group, chunks)), *arguments)

    @intrinsic
    def weigh(context, weights, stride, values, count, sums, upcoming):  # type: ignore[no-untyped-def]
        return _typed(emit, 6)

    return weigh


def make_soften(rows: int, dim: int) -> Any:
    """One block of an online softmax: soften(scores, stride, count, top, total, sums).

    Args:
        rows: R.
        dim: Dv, a multiple of 16.

    Returns:
        A numba function of addresses: scores, count vectors of 16 per row, which become weights
        2^(score - top); top (R,) float32, the largest score so far; total (R, 16) float32, whose
        sum over lanes is the sum of weights; sums (R, Dv) float32. The last three in place.
    """

    def emit_row(b: Builder, row: Any, count: Any, top: Any, total: Any, sums: Any) -> None:
        (largest,) = _variables(b, [_const(HIDDEN)])
        with cgutils.for_range(b, count) as loop:
            scores = _load(b, b.add(row, b.mul(loop.index, _long(64))), _FLOATS)
            b.store(_max(b, b.load(largest), scores), largest)
        new = _llvm(b, "llvm.vector.reduce.fmax.v16f32", _FLOAT, [b.load(largest)])
        old = _load(b, top, _FLOAT)
        with b.if_then(b.fcmp_ordered(">", new, old)):
            _store(b, new, top)
            shrink = _exp2(b, _splat(b, b.fsub(old, new)))
            _store(b, b.fmul(_load(b, total, _FLOATS), shrink), total)
            for offset in range(0, dim * 4, 64):
                _store(b, b.fmul(_load(b, sums, _FLOATS, offset), shrink), sums, offset)
        reference = _splat_load(b, top)
        (summed,) = _variables(b, [_load(b, total, _FLOATS)])
        with cgutils.for_range(b, count) as loop:
            place = b.add(row, b.mul(loop.index, _long(64)))
            scores = _load(b, place, _FLOATS)
            seen = b.fcmp_ordered(">", scores, _const(HIDDEN / 2))
            weights = b.select(seen, _exp2(b, b.fsub(scores, reference)), _const(0.0))
            b.store(b.fadd(b.load(summed), weights), summed)
            _store(b, weights, place)
        _store(b, b.load(summed), total)

    def emit(
        b: Builder, scores: Any, stride: Any, count: Any, top: Any, total: Any, sums: Any
    ) -> None:
        # A loop, not unrolled: rows share no registers here, and code takes time to compile.
        with cgutils.for_range(b, _long(rows)) as loop:
            r = loop.index
            row = b.add(scores, b.mul(stride, r))
            places = (b.add(top, b.mul(_long(4), r)), b.add(total, b.mul(_long(64), r)))
            emit_row(b, row, count, *places, b.add(sums, b.mul(_long(dim * 4), r)))

    @intrinsic
    def soften(context, scores, stride, count, top, total, sums):  # type: ignore[no-untyped-def]
        return _typed(emit, 6)

    return soften


def make_dots(rows: int, dim: int) -> Any:
    """Scores of one key: dots(query, key, out, out_stride).

    Args:
        rows: R.
        dim: D, a multiple of 16.

    Returns:
        A numba function of addresses: query (R, D), key (D,), float32; out, one float32 at every
        out_stride bytes.
    """

    def emit(b: Builder, query: Any, key: Any, out: Any, out_stride: Any) -> None:
        chunks = [_load(b, key, _FLOATS, offset) for offset in range(0, dim * 4, 64)]
        with cgutils.for_range(b, _long(rows)) as loop:
            row, total = b.add(query, b.mul(loop.index, _long(dim * 4))), _const(0.0)
            for c, chunk in enumerate(chunks):
                total = _fma(b, _load(b, row, _FLOATS, c * 64), chunk, total)
            _store(b, _sum(b, total), b.add(out, b.mul(out_stride, loop.index)))

    @intrinsic
    def dots(context, query, key, out, out_stride):  # type: ignore[no-untyped-def]
        return _typed(emit, 4)

    return dots


def _sum(b: Builder, vector: Any) -> Any:
    """Sum over lanes, by halves: the plain reduction of LLVM adds one lane after the other."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    for shift in (8, 4, 2, 1):
        order = ir.Constant(_INTS, [(lane + shift) % LANES for lane in range(LANES)])
        vector = b.fadd(vector, b.shuffle_vector(vector, nothing, order))
    return b.extract_element(vector, ir.Constant(_INT, 0))


class Copies(NamedTuple):
    """Numba functions of addresses between memory and float32; counts are in numbers."""

    widen: Any
    """widen(source, count, target): `count` a multiple of 16."""
    narrow: Any
    """narrow(source, count, target): `count` a multiple of 16."""
    scatter: Any
    """scatter(source, count, target, stride): narrows to one number every `stride` bytes."""


def make_copies(half: bool) -> Copies:
    """The copies for memory of bfloat16 (`half`; rounded to nearest even) or float32."""
    size = 2 if half else 4

    def emit_widen(b: Builder, source: Any, count: Any, target: Any) -> None:
        with cgutils.for_range(b, b.udiv(count, _long(LANES))) as loop:
            place = b.add(source, b.mul(loop.index, _long(LANES * size)))
            numbers = _load_wide(b, place, 0, half)
            _store(b, numbers, b.add(target, b.mul(loop.index, _long(LANES * 4))))

    def emit_narrow(b: Builder, source: Any, count: Any, target: Any) -> None:
        with cgutils.for_range(b, b.udiv(count, _long(LANES))) as loop:
            numbers = _load(b, b.add(source, b.mul(loop.index, _long(LANES * 4))), _FLOATS)
            place = b.add(target, b.mul(loop.index, _long(LANES * size)))
            _store(b, _rounded(b, numbers) if half else numbers, place)

    def emit_scatter(b: Builder, source: Any, count: Any, target: Any, stride: Any) -> None:
        with cgutils.for_range(b, count) as loop:
            number = _splat_load(b, b.add(source, b.mul(loop.index, _long(4))))
            number = _rounded(b, number) if half else number
            first = b.extract_element(number, ir.Constant(_INT, 0))
            _store(b, first, b.add(target, b.mul(loop.index, stride)))

    @intrinsic
    def widen(context, source, count, target):  # type: ignore[no-untyped-def]
        return _typed(emit_widen, 3)

    @intrinsic
    def narrow(context, source, count, target):  # type: ignore[no-untyped-def]
        return _typed(emit_narrow, 3)

    @intrinsic
    def scatter(context, source, count, target, stride):  # type: ignore[no-untyped-def]
        return _typed(emit_scatter, 4)

    return Copies(widen, narrow, scatter)


def _rounded(b: Builder, numbers: Any) -> Any:
    """float32 to the bits of bfloat16; not for NaN."""
    bits = b.bitcast(numbers, _INTS)
    odd = b.and_(b.lshr(bits, _const(16, _INTS)), _const(1, _INTS))
    bits = b.add(bits, b.add(odd, _const(0x7FFF, _INTS)))
    return b.trunc(b.lshr(bits, _const(16, _INTS)), _HALVES)


def make_rotate(dim: int, rotary: int, half: bool, half_source: bool) -> Any:
    """Rotary embedding: rotate(source, cos, sin, factors, target).

    Args:
        dim: D, a multiple of 16.
        rotary: channels that turn, a multiple of 32; the others are copied.
        half: cos and sin are bfloat16.
        half_source: so is the source.

    Returns:
        A numba function of addresses: source (D,); cos, sin (rotary,); factors (D,) float32 on
        the result; target (D,) float32.
    """
    wide, cos_size, size = rotary // 2, 2 if half else 4, 2 if half_source else 4

    def emit(b: Builder, source: Any, cos: Any, sin: Any, factors: Any, target: Any) -> None:
        def put(channel: int, vector: Any) -> None:
            factor = _load(b, factors, _FLOATS, channel * 4)
            _store(b, b.fmul(vector, factor), target, channel * 4)

        for first in range(0, wide, LANES):
            second = first + wide
            x, y = (_load_wide(b, source, c * size, half_source) for c in (first, second))
            for channel, straight, crossed in ((first, x, b.fneg(y)), (second, y, x)):
                c, s = (_load_wide(b, t, channel * cos_size, half) for t in (cos, sin))
                put(channel, _fma(b, crossed, s, b.fmul(straight, c)))
        for channel in range(rotary, dim, LANES):
            put(channel, _load_wide(b, source, channel * size, half_source))

    @intrinsic
    def rotate(context, source, cos, sin, factors, target):  # type: ignore[no-untyped-def]
        return _typed(emit, 5)

    return rotate


def make_blend(half: bool) -> Any:
    """Moves a mean towards a vector: blend(source, count, share, mean).

    Args:
        half: the source is bfloat16, else float32.

    Returns:
        A numba function of addresses: source (count,), count a multiple of 16; share, of one
        float32; mean (count,) float32, which becomes mean + (source - mean) * share.
    """
    size = 2 if half else 4

    def emit(b: Builder, source: Any, count: Any, share: Any, mean: Any) -> None:
        part = _splat_load(b, share)
        with cgutils.for_range(b, b.udiv(count, _long(LANES))) as loop:
            place = b.add(mean, b.mul(loop.index, _long(LANES * 4)))
            new = _load_wide(b, b.add(source, b.mul(loop.index, _long(LANES * size))), 0, half)
            old = _load(b, place, _FLOATS)
            _store(b, _fma(b, b.fsub(new, old), part, old), place)

    @intrinsic
    def blend(context, source, count, share, mean):  # type: ignore[no-untyped-def]
        return _typed(emit, 4)

    return blend


def make_load(kind: str) -> Any:
    """A numba function from an address to the number there: "int8", "int32", "int64", "float32"."""
    ir_kind = {"int8": _BYTE, "int32": _INT, "int64": _LONG, "float32": _FLOAT}[kind]
    result = types.float32 if kind == "float32" else types.int64

    @intrinsic
    def load(context, address):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            loaded = builder.load(_pointer(builder, arguments[0], ir_kind))
            return loaded if kind in ("float32", "int64") else builder.sext(loaded, _LONG)

        return result(types.int64), codegen

    return load


def make_store(kind: str) -> Any:
    """A numba function of an address and a number to put there; kinds as `make_load`."""
    ir_kind = {"int8": _BYTE, "int32": _INT, "int64": _LONG, "float32": _FLOAT}[kind]
    given = types.float32 if kind == "float32" else types.int64

    @intrinsic
    def store(context, address, number):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, number = arguments
            if kind in ("int8", "int32"):
                number = builder.trunc(number, ir_kind)
            builder.store(number, _pointer(builder, address, ir_kind))
            return context.get_dummy_value()

        return types.void(types.int64, given), codegen

    return store


@intrinsic
def call_at(context, function, call, thread):  # type: ignore[no-untyped-def]
    """Calls the procedure at an address with two int64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, *rest = arguments
        kind = ir.FunctionType(ir.VoidType(), [_LONG, _LONG])
        builder.call(builder.inttoptr(function, kind.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
