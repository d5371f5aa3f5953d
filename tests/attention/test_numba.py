"""The CPU kernels against the reference in float64."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cachefold.attention import reference
from tests.attention.calls import Case, Draw, paged_call, seeing, state, step_call, wide

pytest.importorskip("numba", reason="numba is not installed")
from cachefold.attention import numba_backend, numba_calls  # noqa: E402

BACKEND = numba_backend.BACKEND
# Outputs are of order 1. float32: rounding of the sums; bfloat16: of the output and of what is
# rounded on the way to the pages.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CASES = [
    Case(),
    Case(groups=1, delay=0, dim=16, value_dim=48, rotary_dim=0),
    Case(batch=3, groups=8, delay=1, dim=80, value_dim=80, rotary_dim=32, softcap=2.0),
    Case(kv_heads=3, dim=128, value_dim=64, rotary_dim=128, page_size=32, delay=20, factors=True),
    Case(kv_heads=1, groups=16, dim=32, value_dim=16, rotary_dim=32, columns=20, delay=150),
    Case(batch=1, dim=256, value_dim=256, rotary_dim=256, page_size=32, columns=1, delay=3),
    Case(columns=0),
    Case(proportional=True),
    Case(batch=3, groups=8, delay=0, dim=80, rotary_dim=32, softcap=2.0, proportional=True),
    Case(kv_heads=3, page_size=32, delay=20, columns=20, proportional=True),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs and scratch start as NaN: what a kernel forgets to write shows."""
    allocate = torch.empty

    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(255)

    monkeypatch.setattr(torch, "empty", allocate_nan)


@pytest.fixture(params=["one thread", "two threads"])
def threads(request, monkeypatch):
    """Two threads also where one is enough: the split of heads must not show."""
    if request.param == "two threads":
        monkeypatch.setattr(numba_calls, "SERIAL_STRIPS", -1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("queries", [1, 2, 37])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case, queries, dtype, threads):
    call = paged_call(replace(case, queries=queries), dtype)
    assert BACKEND.supports(call) == (True, "")
    sees = seeing(call).repeat_interleave(case.groups, 1)[..., None]
    out = BACKEND.attend(call)
    assert out.dtype == dtype and out.isfinite().all()
    close(out * sees, reference.attend(wide(call)) * sees, dtype)


@DTYPES
@pytest.mark.parametrize("case", [c for c in CASES if c.columns and c.rotary_dim], ids=str)
def test_steps(case, dtype, threads):
    """In place: every tensor of the state is that of the reference after every step."""
    call, draw = step_call(case, dtype), Draw(1, "cpu")
    call = replace(call, table=call.table.clamp(min=0))
    expected = wide(call)
    for _ in range(3):
        assert BACKEND.supports(call) == (True, "")
        out, wanted = BACKEND.step(call), reference.step(expected)
        held, wanted_held = state(call), state(expected)
        for name, tensor in wanted_held.items():
            if name not in ("pages", "tail.key", "tail.value", "tail.omega", "tail.alpha"):
                assert torch.equal(held[name].to(tensor.dtype), tensor), name
        filled = ~expected.pages.isnan()
        assert torch.equal(filled, ~call.pages.isnan())
        close(call.pages[filled], expected.pages[filled], dtype)
        for name in ("tail.key", "tail.value", "tail.omega"):
            close(held[name], wanted_held[name], torch.float32)
        sees = (call.tail.valid | call.ring.valid.any(1, keepdim=True))[:, None, :, None]
        close(out * sees, wanted * sees, dtype)
        new = draw.tokens(case, 1, dtype)
        query = draw.normal(*call.query.shape, dtype=dtype)
        call, expected = (replace(call, new=new, query=query),
                          replace(expected, new=wide(replace(call, new=new)).new,
                                  query=query.double()))  # fmt: skip
        if (call.lengths % case.page_size == 0).any():
            break  # the next entry may need a page, which a cache would have got


@DTYPES
@pytest.mark.parametrize("delay", [0, 5])
def test_many_steps_from_an_empty_text(delay, dtype):
    """Every slot has its page from the start, as after `cache.reserve`."""
    case = Case(batch=2, columns=4, delay=delay)
    draw, call = Draw(3, "cpu"), step_call(case, dtype)
    heads = case.batch * case.kv_heads
    table = torch.randperm(heads * case.columns, generator=draw.generator).view_as(call.table)
    for run in (call.ring, call.tail):
        run.valid.zero_()
    call = replace(
        call, table=table.int(), lengths=call.lengths.zero_(), turn=call.turn.zero_(),
        pages=torch.full_like(call.pages, torch.nan),
    )  # fmt: skip
    expected = wide(call)
    for _ in range(60):
        new, query = draw.tokens(case, 1, dtype), draw.normal(*call.query.shape, dtype=dtype)
        call = replace(call, new=new, query=query)
        expected = replace(expected, new=wide(call).new, query=query.double())
        out, wanted = BACKEND.step(call), reference.step(expected)
        sees = call.tail.valid | call.ring.valid.any(1, keepdim=True)
        sees = sees[:, None, :, None] | (call.lengths > 0).any()
        real = new.valid[:, None, :, None] & sees
        close(out * real, wanted * real, dtype)
    assert torch.equal(call.lengths, expected.lengths) and call.lengths.max() > case.page_size
    filled = ~expected.pages.isnan()
    assert torch.equal(filled, ~call.pages.isnan())
    close(call.pages[filled], expected.pages[filled], dtype)


def test_shared_rotation_of_a_batch():
    """cos and sin of the new tokens may have batch 1."""
    case = CASES[0]
    call = step_call(case, torch.float32)
    call = replace(call, table=call.table.clamp(min=0))
    new = replace(call.new, cos=call.new.cos[:1], sin=call.new.sin[:1])
    call = replace(call, new=new)
    expected = reference.step(wide(call))
    close(BACKEND.step(call), expected, torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case(), torch.float16, "bfloat16 or all float32, not torch.float16"),
        (Case(dim=40, value_dim=40), torch.float32, "multiples of 16, not 40 and 40"),
        (Case(groups=17), torch.float32, "at most 16 query heads may share a kv head, not 17"),
    ],
    ids=str,
)
def test_refusals_say_why(case, dtype, reason):
    ok, said = BACKEND.supports(paged_call(case, dtype))
    assert not ok and reason in said


def test_rotary_dims_are_checked():
    ok, said = BACKEND.supports(step_call(Case(rotary_dim=16), torch.float32))
    assert not ok and "multiple of 32, not 16" in said


def test_missing_numba_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BACKEND.available() == (False, "numba is not installed")


def test_starting_threads_leaves_torch_its_number_of_them():
    """In a process of its own: threads start once."""
    code = """
import torch
from cachefold.attention import numba_kernels as kernels
@kernels.procedure
def nothing(call, thread):
    pass
kernels.launch(nothing, kernels.packed((0,)), 2)
print(torch.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["1"]


@pytest.mark.parametrize("name", ["numba_backend", "numba_kernels"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
