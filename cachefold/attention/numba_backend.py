"""The CPU backend: fused kernels compiled by numba, bfloat16 and float32.

Legend: B requests, K kv heads, H query heads, D key dim, Dv value dim, N exact tokens, w delay.
"""

from __future__ import annotations

import functools
import importlib.util
from array import array
from typing import Any

import torch
from torch import Tensor

from cachefold.attention import blocked
from cachefold.attention.call import PagedCall, ParallelCall, StepCall

MAX_GROUPS = 16
SERIAL_STRIPS = 256
"""Below so many strips of work a second thread costs more to wake than it saves."""
SERIAL_HEADS = 128
"""The same for heads that only fold."""


class NumbaBackend:
    """Decoding and prefill on the CPU; training is plain torch.

    >>> BACKEND.name
    'numba'
    """

    name = "numba"

    def available(self) -> tuple[bool, str]:
        """Whether numba is installed."""
        if importlib.util.find_spec("numba") is None:
            return False, "numba is not installed"
        return True, ""

    def supports(self, call: ParallelCall | PagedCall | StepCall) -> tuple[bool, str]:
        """Whether the kernels were made for these shapes and types."""
        if isinstance(call, ParallelCall):
            return False, "its kernels are for inference with a cache"
        if call.query.device.type != "cpu":
            return False, f"it runs on the CPU, not on {call.query.device.type}"
        dtypes = {tensor.dtype for tensor in _model_tensors(call)}
        if dtypes not in ({torch.bfloat16}, {torch.float32}):
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            return False, f"entries and tokens must all be bfloat16 or all float32, not {names}"
        return _supports_shape(call)

    def parallel(self, call: ParallelCall) -> Tensor:
        """The training form, in plain torch."""
        return blocked.parallel(call)

    def attend(self, call: PagedCall) -> Tensor:
        """Attends from Q new tokens; (B, H, Q, Dv)."""
        if call.query.shape[2] == 1:
            return _decode(call)
        return _prefill(call)

    def step(self, call: StepCall) -> Tensor:
        """Folds in place, then attends from the new token; (B, H, 1, Dv)."""
        return _step(call)


BACKEND = NumbaBackend()


def _model_tensors(call: PagedCall | StepCall) -> list[Tensor]:
    if isinstance(call, PagedCall):
        exact, opened = (call.exact_key, call.exact_value), (call.open_key, call.open_value)
        return [call.query, call.pages, *exact, *opened]
    new, ring, tail = call.new, call.ring, call.tail
    tokens = [tensor for run in (new, ring) for tensor in (run.key, run.value, run.cos)]
    return [call.query, call.pages, *tokens, tail.cos]


def _supports_shape(call: PagedCall | StepCall) -> tuple[bool, str]:
    key = call.exact_key if isinstance(call, PagedCall) else call.new.key
    key_dim = call.query.shape[-1]
    value_dim = call.pages.shape[1] // call.page_size - key_dim
    groups = call.query.shape[1] // key.shape[1]
    if key_dim % 16 or value_dim % 16:
        return False, f"head dims must be multiples of 16, not {key_dim} and {value_dim}"
    if groups > MAX_GROUPS:
        return False, f"at most {MAX_GROUPS} query heads may share a kv head, not {groups}"
    if isinstance(call, StepCall) and call.new.cos.shape[-1] % 32:
        return False, f"rotary dims must be a multiple of 32, not {call.new.cos.shape[-1]}"
    return True, ""


def _shape(call: PagedCall | StepCall, kv_heads: int) -> Any:
    from cachefold.attention.numba_kernels import Shape

    key_dim, size = call.query.shape[-1], call.page_size
    value_dim, half = call.pages.shape[1] // size - key_dim, call.pages.dtype == torch.bfloat16
    groups = call.query.shape[1] // kv_heads
    return Shape(groups, key_dim, value_dim, size, half, call.softcap or 0.0)


def _fields(tensors: dict[str, Tensor], **sizes: int) -> dict[str, int]:
    """The addresses of tensors beside sizes."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items()} | sizes


def _decode(call: PagedCall) -> Tensor:
    """One query position, split over the threads."""
    tokens = call.exact_key.shape[2]
    near = slice(max(tokens - call.delay, 0), tokens)
    held = {
        "query": call.query, "open_key": call.open_key, "open_value": call.open_value,
        "open_valid": call.open_valid, "exact_key": call.exact_key[:, :, near],
        "exact_value": call.exact_value[:, :, near], "exact_valid": call.exact_valid[:, near],
        "visible": call.visible, "pages": call.pages, "table": call.table,
    }  # fmt: skip
    held = {name: tensor.contiguous() for name, tensor in held.items()}
    return _attend_one(_shape(call, call.exact_key.shape[1]), call, held, 0)


def _attend_one(
    shape: Any, call: PagedCall | StepCall, held: dict[str, Tensor], rotary: int, **more: int
) -> Tensor:
    """Runs the decode kernel on contiguous tensors by the names of its fields."""
    from cachefold.attention.numba_decode import Decode, make_decode
    from cachefold.attention.numba_kernels import float_bits, launch, work_nbytes

    (batch, kv_heads, columns), heads = held["table"].shape, call.query.shape[1]
    threads = _threads(batch * kv_heads, batch * kv_heads * columns * call.page_size // 16)
    nbytes = work_nbytes(shape, shape.groups)
    part_nbytes = threads * batch * heads * (shape.value_dim + 2) * 4
    scratch = torch.empty(threads * nbytes + part_nbytes, dtype=torch.uint8)
    out = call.query.new_empty(batch, heads, 1, shape.value_dim)
    given = _fields(
        held, work=scratch.data_ptr(), work_nbytes=nbytes, out=out.data_ptr(), requests=batch,
        parts=scratch.data_ptr() + threads * nbytes, kv_heads=kv_heads, columns=columns,
        num_exact=held["exact_valid"].shape[1], threads=threads,
        scaling=float_bits(call.scaling), **more,
    )  # fmt: skip
    fields = array("q", (given.get(name, 0) for name in Decode._fields))
    place, _ = fields.buffer_info()
    attend_share, join = make_decode(shape, rotary)
    launch(attend_share, place, threads)
    launch(join, place, 1)
    return out


def _threads(heads: int, strips: int) -> int:
    """Threads worth waking; each gets work of at least one strip."""
    return min(torch.get_num_threads(), 2 * heads) if strips > SERIAL_STRIPS else 1


def _prefill(call: PagedCall) -> Tensor:
    from cachefold.attention.numba_kernels import float_bits, launch, work_nbytes
    from cachefold.attention.numba_prefill import Prefill, make_prefill, positions_per_pass

    batch, heads, queries, _ = call.query.shape
    kv_heads, threads = call.exact_key.shape[1], torch.get_num_threads()
    shape = _shape(call, kv_heads)
    nbytes = work_nbytes(shape, positions_per_pass(shape) * shape.groups)
    names = (
        "query", "open_key", "open_value", "open_valid", "exact_key", "exact_value",
        "exact_valid", "visible", "pages", "table",
    )  # fmt: skip
    held = {name: getattr(call, name).contiguous() for name in names}
    scratch = torch.empty(threads * nbytes, dtype=torch.uint8)
    out = call.query.new_empty(batch, heads, queries, shape.value_dim)
    fields = Prefill(
        **_fields(held), work=scratch.data_ptr(), work_nbytes=nbytes, out=out.data_ptr(),
        requests=batch, kv_heads=kv_heads, num_queries=queries,
        num_exact=call.exact_valid.shape[1], columns=call.table.shape[2], delay=call.delay,
        threads=threads, scaling=float_bits(call.scaling),
    )  # fmt: skip
    packed = array("q", fields)
    launch(make_prefill(shape), packed.buffer_info()[0], threads)
    return out


@functools.lru_cache(maxsize=8)
def _ones(dim: int) -> Tensor:
    return torch.ones(dim)


def _step(call: StepCall) -> Tensor:
    new, ring, tail = call.new, call.ring, call.tail
    batch, kv_heads, delay, key_dim = ring.key.shape
    shape, cos, sin = _shape(call, kv_heads), new.cos.contiguous(), new.sin.contiguous()
    rotary = cos.shape[-1]
    factors = _ones(key_dim) if call.factors is None else call.factors.float().contiguous()
    stride = rotary * cos.element_size() if cos.shape[0] > 1 else 0
    _fold(call, shape, factors, stride)
    exact = ring if delay else new
    held = {
        "query": call.query.contiguous(), "open_key": tail.key, "open_value": tail.value,
        "open_valid": tail.valid, "exact_key": ring.key, "exact_value": ring.value,
        "exact_valid": ring.valid, "visible": call.lengths, "pages": call.pages,
        "table": call.table, "query_cos": cos, "query_sin": sin, "open_cos": tail.cos,
        "open_sin": tail.sin, "exact_cos": exact.cos, "exact_sin": exact.sin, "factors": factors,
    }  # fmt: skip
    turn = call.turn.data_ptr() if delay else 0
    return _attend_one(shape, call, held, rotary, query_stride=stride, turn=turn)


def _fold(call: StepCall, shape: Any, factors: Tensor, stride: int) -> None:
    """Runs the folding kernel, which leaves `turn` to the join of decoding."""
    from cachefold.attention.numba_fold import Fold, make_fold
    from cachefold.attention.numba_kernels import launch

    batch, kv_heads, delay, key_dim = call.ring.key.shape
    # A head takes about 0.1 us: fewer than this many don't pay for waking a thread.
    threads = min(batch, torch.get_num_threads()) if batch * kv_heads >= SERIAL_HEADS else 1
    new = [tensor.contiguous() for tensor in call.new.tensors()]
    runs = [tensor.data_ptr() for tensor in (*new, *call.ring.tensors(), *call.tail.tensors())]
    scratch = torch.empty(batch, key_dim + shape.value_dim)
    fields = Fold(
        *runs, factors=factors.data_ptr(), turn=call.turn.data_ptr(),
        pages=call.pages.data_ptr(), table=call.table.data_ptr(), lengths=call.lengths.data_ptr(),
        scratch=scratch.data_ptr(), requests=batch, columns=call.table.shape[2],
        new_stride=stride, threads=threads,
    )  # fmt: skip
    packed = array("q", fields)
    kernel = make_fold(shape, call.new.cos.shape[-1], kv_heads, delay)
    launch(kernel, packed.buffer_info()[0], threads)
