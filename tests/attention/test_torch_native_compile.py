"""torch.compile(fullgraph=True) of the backend `torch`: one graph and the same numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cachefold import DMC
from cachefold.attention import reference, torch_native
from cachefold.models.fold import fold, new_cache
from tests.attention import lists
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

# What Dynamo hands over, the same through functionalization, and as compiled code.
COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def forget():
    """Graphs of one test are not those of another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _check_steps(compiled, text, steps):
    """Compiled steps against those of the reference, state included."""
    want = lists.first_step(text)
    got = copy.deepcopy(want)
    for i in range(steps):
        want, got = lists.next_step(text, want, i), lists.next_step(text, got, i)
        expected, actual = reference.step(want), compiled(got)
        real = text.tokens.valid[:, i]
        torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-12)
    same = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    for name in ("turn", "pages", "lengths"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **same)
    for run in ("ring", "tail"):
        for a, b in zip(getattr(got, run).tensors(), getattr(want, run).tensors(), strict=True):
            torch.testing.assert_close(a, b, **same)
    assert (want.lengths > 0).all()


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_steps_are_one_graph(compiler, delay):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(torch_native.step, fullgraph=True, backend=counter)
    factors = torch.full((lists.DIM,), 0.5, dtype=torch.float64) if delay else None
    text = lists.make_text(
        1, 2, 50, 0.5, [(0, 0), (3, 9)], delay=delay, page_size=16,
        softcap=1.5 if delay else None, factors=factors,
        size_weight=lists.WEIGHTS if delay else None,
    )  # fmt: skip
    with torch.no_grad():
        _check_steps(compiled, text, 50)
    assert counter.frame_count == 1


def test_a_step_of_other_shapes_is_compiled_anew():
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(torch_native.step, fullgraph=True, backend=counter, dynamic=False)
    for batch in (1, 2, 1):
        text = lists.make_text(1, batch, 4, 0.5, [(0, 0)], delay=2, page_size=16)
        compiled(lists.first_step(text))
    assert counter.frame_count == 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_attention_of_one_query_is_one_graph(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(torch_native.attend, fullgraph=True, backend=counter)
    for seed in range(3):
        text = lists.make_text(seed, 2, 60, 0.5, [(0, 0), (0, 7)], delay=4, page_size=16)
        call = lists.paged_call(text, 1)
        # More columns than any head needs, the same in all calls.
        table = torch.full((2, lists.KV_HEADS, 4), -1, dtype=torch.int32)
        table[..., : call.table.shape[2]] = call.table
        call = replace(call, table=table)
        torch.testing.assert_close(compiled(call), reference.attend(call), rtol=0, atol=1e-12)
    assert counter.frame_count == 1


@pytest.fixture(scope="module")
def model():
    folded = fold(tiny_model(num_hidden_layers=1), DMC(cr=2, delay=4))
    scramble_decisions(folded)
    return folded


@torch.inference_mode()
def _decode(model, ids, forward, reserved, backend="torch"):
    """Logits of `ids` (B, T) after the first 12 tokens, token by token."""
    cache = new_cache(model, backend=backend)
    model(ids[:, :12], past_key_values=cache)
    cache.reserve(reserved)
    logits = [
        forward(
            input_ids=ids[:, i : i + 1], past_key_values=cache,
            position_ids=torch.full((len(ids), 1), i),
        ).logits
        for i in range(12, ids.shape[1])
    ]  # fmt: skip
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize(
    ("compiler", "backend"),
    [
        ("aot_eager", "torch"),
        ("eager", "auto"),
        pytest.param("inductor", "torch", marks=pytest.mark.slow),
    ],
)
def test_decoding_of_a_model_is_one_graph(model, compiler, backend):
    counter = CompileCounterWithBackend(compiler)
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    ids = random_ids(2, 40)
    got, compiled_cache = _decode(model, ids, forward, 28, backend)
    want, cache = _decode(model, ids, model.forward, 28, backend)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for a, b in zip(compiled_cache.entries(), cache.entries(), strict=True):
        assert torch.equal(a, b)
    # The second time with the number of tokens seen as a variable, which then holds for all.
    assert counter.frame_count == 2


def test_a_compiled_step_without_pages_says_what_to_do(model):
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"cache\.reserve"):
        _decode(model, random_ids(1, 15), forward, 2)


def test_a_backend_that_no_graph_can_hold_is_refused(model):
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="look into backend .+reference"):
        _decode(model, random_ids(1, 14), forward, 8, "reference")
