"""The backend `torch` against the reference in a chunk of queries: results, memory and work."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cachefold.attention import blocked, reference, torch_native
from cachefold.attention.call import ParallelCall
from tests.attention.calls import chunk_call, converted, seeing, wide
from tests.attention.watch import poison


@pytest.fixture(params=["at once", "by blocks"])
def path(request, monkeypatch):
    """Both ways through a chunk of queries, blocks small enough for small texts."""
    if request.param == "by blocks":
        monkeypatch.setattr(torch_native, "SCORES", 0)
        monkeypatch.setattr(torch_native, "QUERY_ROWS", 12)
        monkeypatch.setattr(torch_native, "BAND_ROWS", 2)
    poison(monkeypatch)


def _check(call, rtol=0.0, atol=1e-12):
    got, want = torch_native.attend(call), reference.attend(wide(call))
    assert got.dtype == call.query.dtype and got.isfinite().all()
    seen = seeing(call).repeat_interleave(got.shape[1] // call.table.shape[1], 1)[..., None]
    torch.testing.assert_close(got.double() * seen, want * seen, rtol=rtol, atol=atol)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 30),
    options=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**16),
            "batch": st.sampled_from([1, 3]),
            "kv_heads": st.integers(1, 2),
            "groups": st.sampled_from([1, 3]),
            "before": st.sampled_from([0, 5, 70]),
            "rate": st.sampled_from([0.0, 0.3, 1.0]),
            "delay": st.sampled_from([0, 1, 4, 16]),
            "page_size": st.sampled_from([16, 32]),
            "softcap": st.sampled_from([None, 1.5]),
            "padding": st.sampled_from([0.0, 0.3, 1.0]),
            "proportional": st.booleans(),
        }
    ),
    older=st.integers(0, 15),
    rows=st.sampled_from([1, 7, 12, 90]),
    band=st.sampled_from([1, 2, 32]),
    scores=st.sampled_from([0, 1 << 20]),
)
def test_attend_equals_reference(queries, options, older, rows, band, scores):
    call = chunk_call(queries, older=min(older, max(options["delay"] - 1, 0)), **options)
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("SCORES", scores), ("QUERY_ROWS", rows), ("BAND_ROWS", band)):
            patch.setattr(torch_native, name, number)
        _check(call)


TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attend_in_lower_precision(dtype, softcap, path):
    call = chunk_call(37, batch=2, before=40, older=3, dim=64, value_dim=32, softcap=softcap)
    call = converted(replace(call, scaling=0.125), dtype)
    _check(call, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_attend_without_entries_or_pages(path):
    call = chunk_call(9, rate=0.0)
    assert call.table.shape[2] == 0
    _check(replace(call, pages=call.pages[:0]))


def test_every_row_is_written(path):
    assert torch_native.attend(chunk_call(31, padding=1.0, batch=2)).isfinite().all()


def test_parallel_is_blocked():
    one = torch.ones(1, 1, 3, 2, requires_grad=True)
    call = ParallelCall(
        query=one, exact_key=one, exact_value=one, merged_key=one, merged_value=one,
        alpha=torch.zeros(1, 1, 3), valid=torch.ones(1, 3, dtype=torch.bool), delay=1, scaling=1.0,
    )  # fmt: skip
    got = torch_native.BACKEND.parallel(call)
    assert got.requires_grad and torch.equal(got, blocked.parallel(call))


class _Made(TorchDispatchMode):
    """Notes the largest tensor made and how much is picked."""

    def __init__(self):
        super().__init__()
        self.largest, self.picked = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.index_select:
            self.picked += out.numel()
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def _long(queries, cr):
    return chunk_call(queries, rate=1 / cr, delay=16, dim=16, value_dim=16, padding=0.0)


def test_memory_of_prefill_grows_with_tokens_not_their_square():
    largest = []
    for queries in (1000, 2000, 4000):
        call = _long(queries, 4)
        with _Made() as made:
            torch_native.attend(call)
        largest.append(made.largest)
    assert largest[1] < 2.1 * largest[0] and largest[2] < 2.1 * largest[1]


def test_work_of_prefill_shrinks_with_entries():
    flops = []
    for cr in (1, 4):
        call = _long(2000, cr)
        with FlopCounterMode(display=False) as counter:
            torch_native.attend(call)
        flops.append(counter.get_total_flops())
    # A quarter of the triangle, its staircase of blocks, and the band.
    assert flops[1] < 0.35 * flops[0]
    square = 2 * 2 * 16 * 6 * 2000**2
    assert flops[0] < 0.62 * square


def test_prefill_copies_only_the_pages_of_each_head(path):
    call = chunk_call(40, batch=3, before=200)
    pages = -(-call.visible[..., -1] // 16)
    assert pages.unique().numel() > 3
    with _Made() as made:
        torch_native.attend(call)
    # All heads together take as many as the longest has.
    count = pages.sum() if torch_native.SCORES == 0 else pages.max() * pages.numel()
    assert made.picked == count * call.pages.shape[1]


@pytest.mark.parametrize("name", ["torch_fold", "torch_native"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
