"""The CPU backend: fused kernels compiled by numba, bfloat16 and float32.

Legend: B requests, K kv heads, H query heads, D key dim, Dv value dim, N exact tokens, w delay.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from cachefold.attention import blocked
from cachefold.attention.call import PagedCall, ParallelCall, StepCall

MAX_GROUPS = 16
SERIAL_STRIPS = 256
"""Below so many strips of work a second thread costs more to wake than it saves."""


class NumbaBackend:
    """Decoding and prefill on the CPU; training is plain torch."""

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
        return [call.query, call.pages, call.exact_key, call.exact_value, call.open_key]
    new, ring, tail = call.new, call.ring, call.tail
    return [call.query, call.pages, new.key, new.value, new.cos, ring.key, ring.cos, tail.cos]


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

    key_dim = call.query.shape[-1]
    return Shape(
        groups=call.query.shape[1] // kv_heads,
        key_dim=key_dim,
        value_dim=call.pages.shape[1] // call.page_size - key_dim,
        page_size=call.page_size,
        half=call.pages.dtype == torch.bfloat16,
        softcap=call.softcap or 0.0,
    )


def _decode(call: PagedCall) -> Tensor:
    """One query position, split over the threads."""
    kv_heads, tokens = call.exact_key.shape[1:3]
    near = slice(max(tokens - call.delay, 0), tokens)
    return _attend_one(
        _shape(call, kv_heads), call, call.table.contiguous(), call.visible.contiguous(),
        query=call.query.contiguous(), open_key=call.open_key.contiguous(),
        open_value=call.open_value.contiguous(), open_valid=call.open_valid.contiguous(),
        exact_key=call.exact_key[:, :, near].contiguous(),
        exact_value=call.exact_value[:, :, near].contiguous(),
        exact_valid=call.exact_valid[:, near].contiguous(), wide=call.pages.dtype == torch.float32,
    )  # fmt: skip


def _attend_one(
    shape: Any, call: PagedCall | StepCall, table: Tensor, visible: Tensor, *, query: Tensor,
    open_key: Tensor, open_value: Tensor, open_valid: Tensor, exact_key: Tensor,
    exact_value: Tensor, exact_valid: Tensor, wide: bool,
) -> Tensor:  # fmt: skip
    """Runs the decode kernel; all contiguous; `wide` as in `make_decode`."""
    from cachefold.attention.numba_decode import Decode, make_decode
    from cachefold.attention.numba_kernels import float_bits, launch, work_nbytes

    batch, heads = query.shape[:2]
    kv_heads, columns = visible.shape[1], table.shape[2]
    threads = _threads(batch * kv_heads, batch * kv_heads * columns * call.page_size // 16)
    nbytes = work_nbytes(shape, shape.groups)
    part_nbytes = threads * batch * heads * (shape.value_dim + 2) * 4
    scratch = torch.empty(threads * nbytes + part_nbytes, dtype=torch.uint8)
    out = torch.empty(batch, heads, 1, shape.value_dim, dtype=call.query.dtype)
    fields = Decode(
        query=query.data_ptr(), open_key=open_key.data_ptr(), open_value=open_value.data_ptr(),
        open_valid=open_valid.data_ptr(), exact_key=exact_key.data_ptr(),
        exact_value=exact_value.data_ptr(), exact_valid=exact_valid.data_ptr(),
        visible=visible.data_ptr(), pages=call.pages.data_ptr(), table=table.data_ptr(),
        work=scratch.data_ptr(), work_nbytes=nbytes, parts=scratch.data_ptr() + threads * nbytes,
        out=out.data_ptr(), requests=batch, kv_heads=kv_heads,
        num_exact=exact_valid.shape[1], columns=columns, threads=threads,
        scaling=float_bits(call.scaling),
    )  # fmt: skip
    attend_share, join = make_decode(shape, wide)
    launch(attend_share, fields, threads)
    launch(join, fields, 1)
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
    held = {
        name: getattr(call, name).contiguous()
        for name in (
            "query", "open_key", "open_value", "open_valid", "exact_key", "exact_value",
            "exact_valid", "visible", "pages", "table",
        )
    }  # fmt: skip
    scratch = torch.empty(threads * nbytes, dtype=torch.uint8)
    out = torch.empty(batch, heads, queries, shape.value_dim, dtype=call.query.dtype)
    fields = Prefill(
        **{name: tensor.data_ptr() for name, tensor in held.items()},
        work=scratch.data_ptr(), work_nbytes=nbytes, out=out.data_ptr(), requests=batch,
        kv_heads=kv_heads, num_queries=queries, num_exact=call.exact_valid.shape[1],
        columns=call.table.shape[2], delay=call.delay, threads=threads,
        scaling=float_bits(call.scaling),
    )  # fmt: skip
    launch(make_prefill(shape), fields, threads)
    return out


@functools.lru_cache(maxsize=8)
def _ones(dim: int) -> Tensor:
    return torch.ones(dim)


def _step(call: StepCall) -> Tensor:
    from cachefold.attention.numba_fold import Fold, make_fold
    from cachefold.attention.numba_kernels import launch

    batch, kv_heads, delay, key_dim = call.ring.key.shape
    shape, factors = _shape(call, kv_heads), _ones(key_dim)
    if call.factors is not None:
        factors = call.factors.float().contiguous()
    query, new = call.query.contiguous(), [t.contiguous() for t in call.new.tensors()]
    runs = [t.data_ptr() for t in (*new, *call.ring.tensors(), *call.tail.tensors())]
    rotated_query = torch.empty(query.shape, dtype=torch.float32)
    rotated_open = torch.empty(batch, kv_heads, 1, key_dim)
    rotated_ring = torch.empty(batch, kv_heads, delay, key_dim)
    scratch = torch.empty(batch, key_dim + shape.value_dim)
    cos, threads = call.new.cos, min(batch, torch.get_num_threads())
    fields = Fold(
        *runs, query=query.data_ptr(), factors=factors.data_ptr(), turn=call.turn.data_ptr(),
        pages=call.pages.data_ptr(), table=call.table.data_ptr(), lengths=call.lengths.data_ptr(),
        rotated_query=rotated_query.data_ptr(), rotated_open=rotated_open.data_ptr(),
        rotated_ring=rotated_ring.data_ptr(), scratch=scratch.data_ptr(), requests=batch,
        columns=call.table.shape[2], threads=threads,
        new_stride=cos.shape[-1] * cos.element_size() if cos.shape[0] > 1 else 0,
    )  # fmt: skip
    launch(make_fold(shape, cos.shape[-1], kv_heads, delay), fields, threads)
    if delay:
        call.turn.add_(1).remainder_(delay)
    return _attend_one(
        shape, call, call.table, call.lengths, query=rotated_query, open_key=rotated_open,
        open_value=call.tail.value, open_valid=call.tail.valid, exact_key=rotated_ring,
        exact_value=call.ring.value, exact_valid=call.ring.valid, wide=True,
    )  # fmt: skip
