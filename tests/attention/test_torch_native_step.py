"""The backend `torch` against the reference in steps: results, state afterwards, no waits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from cachefold.attention import reference, torch_native
from tests.attention import lists
from tests.attention.calls import state
from tests.attention.watch import Waits

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _assert_same_state(got, want):
    wanted = state(want)
    for name, tensor in state(got).items():
        free = name == "pages"  # NaN where no entry is
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, equal_nan=free)


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
        size_weight=lists.WEIGHTS if page_size == 32 else None,
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
        with Waits() as waits:
            torch_native.step(lists.next_step(text, call, i))
        assert not waits.seen
    with Waits() as waits:
        reference.step(lists.next_step(text, call, 5))
    assert waits.seen  # of which the check knows
