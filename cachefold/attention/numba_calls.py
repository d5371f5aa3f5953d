"""Fills the fields of the numba kernels from attention calls, and runs them.

Legend: B requests, K kv heads, H query heads, D key dim, Dv value dim, N exact tokens, w delay.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cachefold.attention.call import PagedCall, StepCall, entries_have_bias, entry_key_dim
from cachefold.attention.numba_decode import Decode, make_decode
from cachefold.attention.numba_fold import Fold, make_fold
from cachefold.attention.numba_kernels import Shape, float_bits, launch, packed, work_nbytes
from cachefold.attention.numba_prefill import Prefill, make_prefill, positions_per_pass
from cachefold.core.tokens import NAMES

SERIAL_STRIPS = 256
"""Below so many strips of work a second thread costs more to wake than it saves."""
SERIAL_HEADS = 128
"""The same for heads that only fold."""


def decode(call: PagedCall) -> Tensor:
    """One query position, split over the threads; (B, H, 1, Dv)."""
    tokens = call.exact_key.shape[2]
    near = slice(max(tokens - call.delay, 0), tokens)
    held = {
        "query": call.query, "open_key": call.open_key, "open_value": call.open_value,
        "open_valid": call.open_valid, "exact_key": call.exact_key[:, :, near],
        "exact_value": call.exact_value[:, :, near], "exact_valid": call.exact_valid[:, near],
        "visible": call.visible, "pages": call.pages, "table": call.table,
    }  # fmt: skip
    held = {name: tensor.contiguous() for name, tensor in held.items()} | _bias(call)
    fields = {name: tensor.data_ptr() for name, tensor in held.items()}
    return _attend_one(call, 0, num_exact=held["exact_valid"].shape[1], **fields)


def prefill(call: PagedCall) -> Tensor:
    """Several query positions; (B, H, Q, Dv)."""
    batch, heads, queries, _ = call.query.shape
    kv_heads, threads = call.exact_key.shape[1], torch.get_num_threads()
    shape = _shape(call)
    nbytes = work_nbytes(shape, positions_per_pass(shape) * shape.groups)
    names = (
        "query", "open_key", "open_value", "open_valid", "exact_key", "exact_value",
        "exact_valid", "visible", "pages", "table",
    )  # fmt: skip
    held = {name: getattr(call, name).contiguous() for name in names} | _bias(call)
    scratch = torch.empty(threads * nbytes, dtype=torch.uint8)
    out = call.query.new_empty(batch, heads, queries, shape.value_dim)
    fields = Prefill(
        **{name: tensor.data_ptr() for name, tensor in held.items()},
        work=scratch.data_ptr(), work_nbytes=nbytes, out=out.data_ptr(),
        requests=batch, kv_heads=kv_heads, num_queries=queries,
        num_exact=call.exact_valid.shape[1], columns=call.table.shape[2], delay=call.delay,
        threads=threads, scaling=float_bits(call.scaling),
    )  # fmt: skip
    launch(make_prefill(shape), packed(fields), threads)
    return out


def step(call: StepCall) -> Tensor:
    """Folds in place, then attends from the new token; (B, H, 1, Dv)."""
    batch, kv_heads, delay, key_dim = call.ring.key.shape
    shape = _shape(call)
    fresh = [tensor.contiguous() for tensor in call.new.tensors()]
    # Only addresses go on: these names keep alive what they are the addresses of.
    query = call.query.contiguous()
    factors = _ones(key_dim) if call.factors is None else call.factors.float().contiguous()
    new, ring, tail = _places(fresh), _places(call.ring.tensors()), _places(call.tail.tensors())
    open_bias = size_weight = 0
    if call.size_weight is not None:
        assert all(run.size is not None for run in (call.new, call.ring, call.tail))
        weight, bias = call.size_weight.float().contiguous(), torch.empty(batch, kv_heads)
        size_weight, open_bias = weight.data_ptr(), bias.data_ptr()
    cos, rotary = fresh[2], fresh[2].shape[-1]
    stride = rotary * cos.element_size() if cos.shape[0] > 1 else 0
    shared = {
        "pages": call.pages.data_ptr(), "table": call.table.data_ptr(),
        "factors": factors.data_ptr(),
    }  # fmt: skip
    lengths, turn = call.lengths.data_ptr(), call.turn.data_ptr()
    # A head takes about 0.1 us: fewer than this many don't pay for waking a thread.
    threads = min(batch, torch.get_num_threads()) if batch * kv_heads >= SERIAL_HEADS else 1
    scratch = torch.empty(batch, key_dim + shape.value_dim)
    fold = Fold(
        *new, *ring, *tail, **shared, turn=turn, lengths=lengths, scratch=scratch.data_ptr(),
        size_weight=size_weight, open_bias=open_bias, requests=batch,
        columns=call.table.shape[2], new_stride=stride, threads=threads,
    )  # fmt: skip
    launch(make_fold(shape, rotary, kv_heads, delay), packed(fold), threads)
    open_key, open_value, open_cos, open_sin, _, _, open_valid, _ = tail
    exact_key, exact_value, exact_cos, exact_sin, _, _, exact_valid, _ = ring if delay else new
    return _attend_one(
        call, rotary, query=query.data_ptr(), open_key=open_key, open_value=open_value,
        open_valid=open_valid, open_bias=open_bias,
        exact_key=exact_key, exact_value=exact_value,
        exact_valid=exact_valid, visible=lengths, **shared, query_cos=new[2], query_sin=new[3],
        open_cos=open_cos, open_sin=open_sin, exact_cos=exact_cos, exact_sin=exact_sin,
        # The fold leaves `turn` to the join of decoding.
        turn=turn if delay else 0, num_exact=delay, query_stride=stride,
    )  # fmt: skip


def _attend_one(call: PagedCall | StepCall, rotary: int, **given: int) -> Tensor:
    """Runs the decode kernel; `given` are fields of it, addresses of contiguous tensors."""
    shape, (batch, kv_heads, columns), heads = _shape(call), call.table.shape, call.query.shape[1]
    threads = _threads(batch * kv_heads, batch * kv_heads * columns * call.page_size // 16)
    nbytes = work_nbytes(shape, shape.groups)
    part_nbytes = threads * batch * heads * (shape.value_dim + 2) * 4
    scratch = torch.empty(threads * nbytes + part_nbytes, dtype=torch.uint8)
    out, work = call.query.new_empty(batch, heads, 1, shape.value_dim), scratch.data_ptr()
    fields = packed(
        Decode(
            **given, work=work, work_nbytes=nbytes, parts=work + threads * nbytes,
            out=out.data_ptr(), requests=batch, kv_heads=kv_heads, columns=columns,
            threads=threads, scaling=float_bits(call.scaling),
        )
    )  # fmt: skip
    attend_share, join = make_decode(shape, rotary)
    launch(attend_share, fields, threads)
    launch(join, fields, 1)
    return out


def _shape(call: PagedCall | StepCall) -> Shape:
    key_dim, size = call.query.shape[-1], call.page_size
    value_dim = call.pages.shape[1] // size - entry_key_dim(call)
    half, biased = call.pages.dtype == torch.bfloat16, entries_have_bias(call)
    groups = call.query.shape[1] // call.table.shape[1]
    return Shape(groups, key_dim, value_dim, size, half, call.softcap or 0.0, biased)


def _bias(call: PagedCall) -> dict[str, Tensor]:
    """The bias on open entries as the kernels take it; of nothing where there is none."""
    bias = call.open_bias
    return {"open_bias": torch.empty(0) if bias is None else bias.float().contiguous()}


def _places(tensors: list[Tensor]) -> list[int]:
    """Addresses of the tensors of `Tokens`, 0 for sizes that are not there."""
    places = [tensor.data_ptr() for tensor in tensors]
    return places if len(places) == len(NAMES) else [*places, 0]


def _threads(heads: int, strips: int) -> int:
    """Threads worth waking; each gets work of at least one strip."""
    return min(torch.get_num_threads(), 2 * heads) if strips > SERIAL_STRIPS else 1


@functools.lru_cache(maxsize=8)
def _ones(dim: int) -> Tensor:
    return torch.ones(dim)
