"""Triton's prefill and decode on a GPU: the cases of the interpreter, and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from tests.attention.triton_cases import *  # noqa: F403
from tests.attention.triton_cases import (
    BACKEND,
    CASES,
    Case,
    assert_outputs,
    assert_same_state,
    copied,
    paged_call,
    reference,
    sees_step,
    step_call,
    text_start,
    tokens_to_step,
    widened,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_the_backend_runs_here_and_takes_every_case():
    assert BACKEND.available() == (True, "")
    for case in CASES:
        for call in (step_call(case, torch.bfloat16), paged_call(case, torch.bfloat16)):
            assert BACKEND.supports(call) == (True, "")


def test_nothing_waits_for_the_device():
    calls = [step_call(CASES[0], torch.bfloat16), paged_call(CASES[0], torch.bfloat16)]
    for mode in ("default", "error"):  # the first time, kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            BACKEND.step(calls[0])
            BACKEND.attend(calls[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("delay", [0, 5])
def test_a_cuda_graph_of_a_step_goes_on_for_many_tokens(delay, proportional):
    case, dtype = Case(delay=delay, columns=4, proportional=proportional), torch.bfloat16
    call = text_start(case, dtype)
    expected = widened(call)
    BACKEND.step(copied(call))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = BACKEND.step(call)
    for query, new in tokens_to_step(case, dtype, 40):
        call.query.copy_(query)
        held = call.new.named()
        for name, tensor in new.named().items():
            held[name].copy_(tensor)
        graph.replay()
        want = reference.step(replace(expected, query=query.float(), new=widened(new)))
        # 40 tokens in a row: entries are rounded each time that they take in another (0.019
        # was seen on an H200, where one number of 768 was off by more than for one step).
        assert_outputs(got, want, sees_step(call)[..., None], 3e-2)
        assert_same_state(call, expected, 1.6e-2)
    assert call.lengths.max() > case.page_size
