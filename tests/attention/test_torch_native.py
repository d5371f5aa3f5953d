"""The backend `torch` against the reference: results, state after steps, memory and work."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cachefold.attention import blocked, reference, torch_native
from cachefold.attention.call import PagedCall, ParallelCall
from cachefold.core.pages import key_view, value_view
from tests.attention import lists

DIM, VALUE_DIM = 6, 4


@pytest.fixture(params=["at once", "by blocks"])
def path(request, monkeypatch):
    """Both ways through a chunk of queries, blocks small enough for small texts."""
    if request.param == "by blocks":
        monkeypatch.setattr(torch_native, "SCORES", 0)
        monkeypatch.setattr(torch_native, "QUERY_ROWS", 12)
        monkeypatch.setattr(torch_native, "BAND_ROWS", 2)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(math.nan))


def _paged(
    queries, *, seed=0, batch=1, kv_heads=2, groups=3, older=0, before=0, rate=0.5, delay=4,
    dim=DIM, value_dim=VALUE_DIM, page_size=16, softcap=None, padding=0.2,
) -> PagedCall:  # fmt: skip
    """A chunk at random, `rate` of the queries see one entry more; free slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def chance(rate, *shape):
        return torch.rand(*shape, generator=generator) < rate

    first = torch.randint(0, before + 1, (batch, kv_heads, 1), generator=generator)
    visible = first + chance(rate, batch, kv_heads, queries).long().cumsum(-1)
    held = -(-visible[..., -1] // page_size)
    column = torch.arange(int(held.max()))
    table = torch.randperm(held.numel() * len(column) + 1, generator=generator)[:-1].int()
    table = table.view(batch, kv_heads, len(column))
    pages = torch.full((table.numel() + 1, page_size * (dim + value_dim)), math.nan).double()
    for b in range(batch):
        for k in range(kv_heads):
            slot = torch.arange(int(visible[b, k, -1]))
            page, row = table[b, k, slot // page_size].long(), slot % page_size
            key_view(pages, page_size, dim)[page, :, row] = draw(len(slot), dim)
            value_view(pages, page_size, dim)[page, row] = draw(len(slot), value_dim)
    table[column >= held[..., None]] = -1
    return PagedCall(
        query=draw(batch, kv_heads * groups, queries, dim), pages=pages, page_size=page_size,
        table=table, visible=visible, open_key=draw(batch, kv_heads, queries, dim),
        open_value=draw(batch, kv_heads, queries, value_dim),
        open_valid=chance(1 - padding, batch, queries),
        exact_key=draw(batch, kv_heads, queries + older, dim),
        exact_value=draw(batch, kv_heads, queries + older, value_dim),
        exact_valid=chance(1 - padding, batch, queries + older),
        delay=delay, scaling=0.5, softcap=softcap,
    )  # fmt: skip


def _sees_something(call: PagedCall) -> torch.Tensor:
    """(B, H, Q, 1) bool; what a query gets that sees nothing says nothing."""
    rest = call.open_valid | reference._is_exact(call).any(-1)
    groups = call.query.shape[1] // call.table.shape[1]
    return ((call.visible > 0) | rest[:, None]).repeat_interleave(groups, 1)[..., None]


def _to(call: PagedCall, dtype: torch.dtype) -> PagedCall:
    names = ("query", "pages", "open_key", "open_value", "exact_key", "exact_value")
    return replace(call, **{name: getattr(call, name).to(dtype) for name in names})


def _check(call, rtol=0.0, atol=1e-12):
    got, want = torch_native.attend(call), reference.attend(_to(call, torch.float64))
    assert got.dtype == call.query.dtype and got.isfinite().all()
    seen = _sees_something(call)
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
        }
    ),
    older=st.integers(0, 15),
    rows=st.sampled_from([1, 7, 12, 90]),
    band=st.sampled_from([1, 2, 32]),
    scores=st.sampled_from([0, 1 << 20]),
)
def test_attend_equals_reference(queries, options, older, rows, band, scores):
    call = _paged(queries, older=min(older, max(options["delay"] - 1, 0)), **options)
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("SCORES", scores), ("QUERY_ROWS", rows), ("BAND_ROWS", band)):
            patch.setattr(torch_native, name, number)
        _check(call)


TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attend_in_lower_precision(dtype, softcap, path):
    call = _paged(37, batch=2, before=40, older=3, dim=64, value_dim=32, softcap=softcap)
    call = _to(replace(call, scaling=0.125), dtype)
    _check(call, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_attend_without_entries_or_pages(path):
    call = _paged(9, rate=0.0)
    assert call.table.shape[2] == 0
    _check(replace(call, pages=call.pages[:0]))


def test_every_row_is_written(path):
    assert torch_native.attend(_paged(31, padding=1.0, batch=2)).isfinite().all()


def test_parallel_is_blocked():
    one = torch.ones(1, 1, 3, 2, requires_grad=True)
    call = ParallelCall(
        query=one, exact_key=one, exact_value=one, merged_key=one, merged_value=one,
        alpha=torch.zeros(1, 1, 3), valid=torch.ones(1, 3, dtype=torch.bool), delay=1, scaling=1.0,
    )  # fmt: skip
    got = torch_native.BACKEND.parallel(call)
    assert got.requires_grad and torch.equal(got, blocked.parallel(call))


class _Made(TorchDispatchMode):
    """Notes the largest tensor made, what is picked, and what reads numbers from the device."""

    def __init__(self):
        super().__init__()
        self.largest, self.picked, self.waits = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal
        ):  # fmt: skip
            self.waits.append(func)
        if func.overloadpacket is torch.ops.aten.index_select:
            self.picked += out.numel()
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def _long(queries, cr):
    return _paged(queries, rate=1 / cr, delay=16, dim=16, value_dim=16, padding=0.0)


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
    call = _paged(40, batch=3, before=200)
    pages = -(-call.visible[..., -1] // 16)
    assert pages.unique().numel() > 3
    with _Made() as made:
        torch_native.attend(call)
    page = 16 * (DIM + VALUE_DIM)
    # All heads together take as many as the longest has.
    count = pages.sum() if torch_native.SCORES == 0 else pages.max() * pages.numel()
    assert made.picked == count * page


def _assert_same_state(got, want):
    for name in ("turn", "pages", "lengths"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True
        )
    for run in ("ring", "tail"):
        for name in ("key", "value", "cos", "sin", "alpha", "omega", "valid"):
            pair = (getattr(getattr(call, run), name) for call in (got, want))
            torch.testing.assert_close(*pair, rtol=0, atol=0)


def _only_needed(call, lengths):
    """The same call with a table of the pages for `lengths` entries and no others."""
    held = -(-lengths // call.page_size)
    table = call.table[..., : int(held.max())].clone()
    table[torch.arange(table.shape[2]) >= held[..., None]] = -1
    return replace(call, table=table)


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("delay", [0, 1, 16])
def test_steps_leave_the_same_state(delay, page_size, reserved):
    factors = torch.full((lists.DIM,), 0.5, dtype=torch.float64) if delay == 1 else None
    text = lists.make_text(
        3, 3, 90, 0.4, [(0, 0), (0, 20), (41, 50)], delay=delay, page_size=page_size,
        softcap=1.5 if delay else None, factors=factors,
    )  # fmt: skip
    want = lists.first_step(text)
    got = copy.deepcopy(want)
    for i in range(90):
        want, got = lists.next_step(text, want, i), lists.next_step(text, got, i)
        expected = reference.step(want)
        call = got if reserved else _only_needed(got, want.lengths)
        actual = torch_native.step(call)
        assert actual.isfinite().all()
        real = text.tokens.valid[:, i]
        torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-12)
        _assert_same_state(got, want)
    assert (want.lengths > 16).all() and want.lengths.unique().numel() > 3


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_steps_in_lower_precision(dtype):
    text = lists.make_text(5, 2, 60, 0.5, [(0, 0), (0, 9)], delay=4, page_size=16)
    exact = lists.first_step(text)
    tokens = replace(
        text.tokens, key=text.tokens.key.to(dtype), value=text.tokens.value.to(dtype),
        cos=text.tokens.cos.to(dtype), sin=text.tokens.sin.to(dtype),
        alpha=text.tokens.alpha.float(), omega=text.tokens.omega.float(),
    )  # fmt: skip
    low = replace(text, query=text.query.to(dtype), tokens=tokens)
    want = lists.first_step(low)
    narrow = replace(
        want.ring, **{n: getattr(want.ring, n).to(dtype) for n in ("key", "value", "cos", "sin")}
    )
    open_entry = replace(want.tail, cos=want.tail.cos.to(dtype), sin=want.tail.sin.to(dtype))
    open_entry = replace(
        open_entry, **{n: getattr(open_entry, n).float() for n in ("key", "value", "omega")}
    )
    got = replace(want, ring=narrow, tail=open_entry, pages=want.pages.to(dtype))
    want = copy.deepcopy(got)
    for i in range(60):
        want, got = lists.next_step(low, want, i), lists.next_step(low, got, i)
        exact = lists.next_step(text, exact, i)
        truth, _, actual = reference.step(exact), reference.step(want), torch_native.step(got)
        real = text.tokens.valid[:, i]
        assert actual.dtype == dtype
        error = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        torch.testing.assert_close(actual[real].double(), truth[real], **error)
        _assert_same_state(got, want)


def test_a_step_waits_for_nothing():
    text = lists.make_text(0, 2, 40, 0.5, [(0, 0)], delay=2, page_size=16)
    call = lists.first_step(text)
    for i in range(40):
        with _Made() as made:
            torch_native.step(lists.next_step(text, call, i))
        assert not made.waits
    with _Made() as made:
        reference.step(lists.next_step(text, call, 5))
    assert made.waits  # of which the check knows


@pytest.mark.parametrize("name", ["torch_fold", "torch_native"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
