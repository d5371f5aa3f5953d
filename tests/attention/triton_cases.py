"""Triton's prefill and decode against the reference: the same on a GPU and in the interpreter.

test_triton_inference.py runs this file in a process where TRITON_INTERPRET=1 is set before triton
is imported (afterwards is too late), test_triton_gpu.py runs it on a GPU.
"""

from __future__ import annotations

import doctest
import importlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import triton

from cachefold.attention import reference, triton_backend, triton_decode, triton_step
from cachefold.core.tokens import Tokens
from tests.attention import calls
from tests.attention.calls import Case, Draw, seeing
from tests.attention.watch import Waits, poison

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# Against the reference in float32 on the same inputs; outputs are of order 1. Relative and
# absolute: two roundings of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
BACKEND = triton_backend.BACKEND


CASES = [
    Case(),
    Case(groups=1, delay=0, dim=16, value_dim=16, rotary_dim=16),
    Case(batch=3, groups=8, delay=1, dim=80, value_dim=80, rotary_dim=32, softcap=2.0),
    Case(kv_heads=3, dim=16, value_dim=48, rotary_dim=8, delay=5, softcap=2.0, proportional=True),
    Case(kv_heads=3, dim=128, value_dim=64, rotary_dim=128, page_size=32, delay=20, factors=True),
    Case(kv_heads=1, groups=17, dim=16, value_dim=48, rotary_dim=8, columns=20, softcap=5.0),
    Case(batch=1, dim=256, value_dim=256, rotary_dim=256, page_size=32, columns=1, delay=3),
    Case(columns=0),
    Case(groups=1, delay=0, dim=16, rotary_dim=16, page_size=32, columns=20, proportional=True),
    Case(batch=1, dim=80, value_dim=80, factors=True, proportional=True),
]
CASES_SHORT = CASES[:4]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def whole_numbers(monkeypatch):
    """The interpreter holds bfloat16 as bits in integers, and its `dot` multiplies the bits."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def numbers(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, triton.language.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, numbers(a), numbers(b), *rest),
    )


def step_call(case, dtype, seed=0):
    return calls.step_call(case, dtype, seed, DEVICE)


def paged_call(case, dtype, seed=0):
    return calls.paged_call(case, dtype, seed, DEVICE)


def copied(call, convert=torch.clone):
    """The same call or tokens with tensors of its own."""
    copies = {}
    for field in fields(call):
        value = getattr(call, field.name)
        if isinstance(value, Tokens):
            value = copied(value, convert)
        copies[field.name] = convert(value) if isinstance(value, torch.Tensor) else value
    return replace(call, **copies)


def widened(call):
    """The same call in float32, with tensors of its own."""
    return copied(call, lambda x: x.float().clone() if x.is_floating_point() else x.clone())


def sees_step(call):
    """(B, K) bool after a step: whether the query of a head sees anything."""
    some = call.tail.valid.any(1) | call.ring.valid.any(1)
    return some[:, None] | (call.lengths > 0)


def assert_outputs(actual, expected, sees, tolerance):
    """Equal where a query sees something, 0 elsewhere; `sees` (B, K, Q)."""
    sees = sees.repeat_interleave(actual.shape[1] // sees.shape[1], 1)[..., None]
    assert actual.shape == expected.shape
    assert (actual.masked_fill(sees, 0.0) == 0).all()
    torch.testing.assert_close(
        actual.masked_fill(~sees, 0.0).float(),
        expected.masked_fill(~sees, 0.0),
        rtol=tolerance,
        atol=tolerance,
    )


def assert_same_state(actual, expected, tolerance):
    """Copies are exact, means differ by roundings of float32, pages by one of their dtype."""
    for name, exact in (("ring", 0.0), ("tail", 1e-5)):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        wanted = theirs.named()
        assert list(ours.named()) == list(wanted)
        for field, tensor in ours.named().items():
            atol = exact if field in ("key", "value", "omega") else 0.0
            torch.testing.assert_close(tensor.float(), wanted[field].float(), rtol=0, atol=atol)
    torch.testing.assert_close(actual.turn, expected.turn)
    torch.testing.assert_close(actual.lengths, expected.lengths)
    pages = actual.pages.float(), expected.pages
    torch.testing.assert_close(*pages, rtol=tolerance / 2, atol=tolerance / 2, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_equals_reference(case, dtype):
    call = step_call(case, dtype)
    expected = widened(call)
    want, got = reference.step(expected), BACKEND.step(call)
    assert got.dtype == dtype
    assert_outputs(got, want, sees_step(call)[..., None], TOLERANCE[dtype])
    assert_same_state(call, expected, TOLERANCE[dtype])


def text_start(case, dtype):
    """A step before which nothing is there, with room for every entry."""
    call = step_call(case, dtype)
    for tensor in (call.lengths, call.turn, call.ring.valid, call.tail.valid):
        tensor.zero_()
    pages = torch.arange(case.batch * case.kv_heads * case.columns, dtype=torch.int32)
    return replace(
        call,
        table=pages.view(case.batch, case.kv_heads, -1).to(DEVICE),
        pages=torch.full_like(call.pages, torch.nan),
    )


def tokens_to_step(case, dtype, count):
    """Queries and new tokens; the first request merges nothing and so fills its pages."""
    draw = Draw(1, DEVICE)
    for _ in range(count):
        new = draw.tokens(case, 1, dtype)
        new.alpha[0] = 0.0
        yield draw.normal(case.batch, case.kv_heads * case.groups, 1, case.dim, dtype=dtype), new


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("delay", [0, 5])
def test_many_steps_equal_reference(delay, proportional):
    case = Case(
        2, 1, delay=delay, dim=16, value_dim=16, rotary_dim=16, columns=2, proportional=proportional
    )
    call = text_start(case, torch.float32)
    expected = copied(call)
    for query, new in tokens_to_step(case, torch.float32, 28):
        want = reference.step(replace(expected, query=query, new=new))
        got = BACKEND.step(replace(call, query=query, new=new))
        assert_outputs(got, want, sees_step(call)[..., None], 1e-5)
        assert_same_state(call, expected, 1e-5)
    assert call.lengths.max() > case.page_size and call.lengths.min() < call.lengths.max()


@pytest.mark.parametrize("shared", ["cos", "layout"])
def test_step_takes_new_tokens_as_the_model_gives_them(shared):
    call = step_call(Case(delay=2), torch.float32)
    new = call.new
    if shared == "cos":
        new = replace(new, cos=new.cos[:1], sin=new.sin[:1])
    else:
        merged = torch.cat([new.key, new.value], -1)
        new = replace(new, key=merged[..., :64], value=merged[..., 64:])
    expected = replace(copied(call), new=new)
    call = replace(call, new=new)
    want, got = reference.step(expected), BACKEND.step(call)
    assert_outputs(got, want, sees_step(call)[..., None], 1e-5)
    assert_same_state(call, expected, 1e-5)


@DTYPES
@pytest.mark.parametrize("queries", [1, 2, 45])
@pytest.mark.parametrize("case", CASES_SHORT, ids=str)
def test_attend_equals_reference(case, queries, dtype):
    check_attend(replace(case, queries=queries), dtype)


@pytest.mark.parametrize("queries", [1, 45])
@pytest.mark.parametrize("case", CASES[4:], ids=str)
def test_attend_equals_reference_for_odd_shapes(case, queries):
    check_attend(replace(case, queries=queries), torch.float32)


def check_attend(case, dtype):
    call = paged_call(case, dtype)
    sees = seeing(call)
    want, got = reference.attend(widened(call)), BACKEND.attend(call)
    assert sees.any() and got.dtype == dtype
    assert_outputs(got, want, sees, TOLERANCE[dtype])


def test_prefill_with_many_tiles_equals_reference():
    # 130 queries of 3 heads: several tiles of rows, the last one not full, over 9 tiles of entries.
    case = Case(batch=1, kv_heads=1, queries=130, dim=16, value_dim=16, columns=18, delay=40)
    check_attend(case, torch.float32)


def test_an_attend_changes_nothing():
    call = paged_call(Case(queries=1, delay=4), torch.float32)
    before = copied(call)
    BACKEND.attend(call)
    for field in fields(call):
        if isinstance(getattr(call, field.name), torch.Tensor):
            torch.testing.assert_close(
                getattr(call, field.name), getattr(before, field.name), equal_nan=True
            )


@pytest.fixture
def launches(monkeypatch):
    """Name, grid, sizes and tensors of every launch of a step."""
    seen = []
    for kernel in (
        triton_step.fold_fwd_kernel, triton_decode.decode_fwd_kernel,
        triton_decode.combine_fwd_kernel,
    ):  # fmt: skip

        def run(*args, grid, warmup, kernel=kernel, original=kernel.run, **kwargs):
            sizes = {k: v for k, v in kwargs.items() if isinstance(v, int | float)}
            seen.append((kernel.__name__, grid, sizes, kwargs))
            return original(*args, grid=grid, warmup=warmup, **kwargs)

        monkeypatch.setattr(kernel, "run", run)
    return seen


def test_launches_do_not_depend_on_lengths(launches):
    full = step_call(CASES[5], torch.float32)
    empty = replace(copied(full), lengths=torch.zeros_like(full.lengths))
    empty.tail.valid.zero_()
    for call in (full, empty):
        with Waits() as waits:
            BACKEND.step(call)
        assert not waits.seen
    assert [launch[:3] for launch in launches[:3]] == [launch[:3] for launch in launches[3:]]
    *_, kwargs = launches[4]
    entries, rest = kwargs["p_part"].split([kwargs["p_part"].shape[2] - 1, 1], 2)
    assert entries.shape[2] > 1 and entries.isnan().all()  # left at once
    assert not rest.isnan().any()


@pytest.mark.skipif(DEVICE != "cpu", reason="the examples make their tensors on the CPU")
@pytest.mark.parametrize("name", ["backend", "decode", "prefill", "step"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.triton_{name}"))
    assert result.attempted and not result.failed
