"""Triton's training attention against the reference, forward and gradient.

`test_triton_train` runs this module in Triton's interpreter, `test_triton_train_gpu` on a GPU.
"""

from __future__ import annotations

import doctest
import importlib
from dataclasses import dataclass, replace

import pytest
import torch

from cachefold.attention import reference, triton_backend, triton_train, triton_train_tiles
from cachefold.attention.call import ParallelCall
from tests.attention.triton_gradients import (
    BATCH,
    DEVICE,
    HALVES,
    INTERPRETED,
    TOLERANCES,
    assert_near,
    draw_alpha,
    drawer,
    with_gradients,
)
from tests.attention.watch import poison


@dataclass(frozen=True, kw_only=True)
class Case:
    tokens: int
    kind: str = "soft"
    delay: int = 16
    group: int = 1
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    padding: int = 0
    softcap: float | None = None
    bias: bool = False


CASES = [
    Case(tokens=1, delay=1),
    Case(tokens=1, delay=0, group=3),
    Case(tokens=7, delay=0, group=3, dim=64, padding=2, softcap=2.0),
    Case(tokens=7, delay=16, dim=80, value_dim=64, kind="hard"),
    Case(tokens=33, delay=16, kv_heads=2, dim=80, value_dim=64, padding=3, kind="hard"),
    Case(tokens=33, delay=1, group=3, value_dim=80, kind="merge", softcap=2.0),
    Case(tokens=33, delay=50, kind="append", padding=5),
    Case(tokens=70, delay=16, group=3, padding=20),
    Case(tokens=70, delay=0, dim=64, value_dim=64, kind="append"),
    Case(tokens=70, delay=34, kind="mild"),
    Case(tokens=33, delay=16, group=3, kv_heads=2, padding=3, softcap=2.0, bias=True),
    Case(tokens=70, delay=0, kind="hard", bias=True),
    Case(tokens=7, delay=1, kind="merge", bias=True),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    return poison(monkeypatch)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 16, so that a short text has many."""
    for table in ("FORWARD_BLOCKS", "BACKWARD_BLOCKS"):
        for key, blocks in getattr(triton_train_tiles, table).items():
            small = replace(blocks, rows=16, columns=16)
            monkeypatch.setitem(getattr(triton_train_tiles, table), key, small)


def attention_inputs(case, dtype, seed=0):
    """Query, exact and merged keys and values, alpha and a bias, if the case has one; then `valid`
    and the gradient of the output.

    Nobody uses the output at padding: its gradient there is 0.
    """
    draw = drawer(seed)
    heads = case.group * case.kv_heads
    kv = BATCH, case.kv_heads, case.tokens
    tensors = [
        draw(BATCH, heads, case.tokens, case.dim), draw(*kv, case.dim), draw(*kv, case.value_dim),
        draw(*kv, case.dim), draw(*kv, case.value_dim),
    ]  # fmt: skip
    tensors = [x.to(DEVICE, dtype) for x in tensors]
    alpha = draw_alpha(draw, case.kind, *kv).to(DEVICE, torch.float32)
    valid = torch.ones(BATCH, case.tokens, dtype=torch.bool, device=DEVICE)
    valid[0, : case.padding] = False
    grad = draw(BATCH, heads, case.tokens, case.value_dim).to(DEVICE, dtype)
    bias = [draw(*kv).to(DEVICE, torch.float32)] if case.bias else []
    return [*tensors, alpha, *bias], valid, grad * valid[:, None, :, None]


def attend(parallel, case, leaves, valid):
    query, exact_key, exact_value, merged_key, merged_value, alpha, *bias = leaves
    return parallel(
        ParallelCall(
            query=query, exact_key=exact_key, exact_value=exact_value, merged_key=merged_key,
            merged_value=merged_value, merged_bias=bias[0] if bias else None, alpha=alpha,
            valid=valid, delay=case.delay, scaling=case.dim**-0.5, softcap=case.softcap,
        )
    )  # fmt: skip


def check_attention(case, dtype):
    leaves, valid, grad = attention_inputs(case, dtype)
    real = valid[:, None, :, None]

    def run(parallel):
        return lambda leaves: [attend(parallel, case, leaves, valid) * real]

    actual = with_gradients(run(triton_train.parallel), leaves, [grad])
    expected = with_gradients(run(reference.parallel), [x.double() for x in leaves], [grad])
    assert [a.dtype for a in actual] == [dtype] * 6 + [torch.float32] * (1 + case.bias)
    assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_reference(case, small_tiles):
    check_attention(case, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [CASES[4], CASES[5], CASES[10]], ids=str)
def test_half_precision_attention_equals_reference(case, dtype, small_tiles):
    check_attention(case, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_equals_reference_in_tiles_of_the_table(dim, dtype):
    check_attention(Case(tokens=70, delay=4, dim=dim, value_dim=dim), dtype)


def test_padding_rows_are_zero_and_give_no_gradient(small_tiles):
    case = Case(tokens=33, delay=4, padding=20)
    leaves, valid, _ = attention_inputs(case, torch.float32)
    padding = (~valid).float()[:, None, :, None]

    def run(leaves):
        return [attend(triton_train.parallel, case, leaves, valid)]

    out, *gradients = with_gradients(run, leaves, [padding.expand(-1, -1, -1, case.value_dim)])
    assert (out * padding == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_alpha_that_hides_a_column_gets_no_gradient_and_one_near_it_none_either(small_tiles):
    case = Case(tokens=33, delay=2)
    leaves, valid, grad = attention_inputs(case, torch.float32)
    leaves[-1][..., 5], leaves[-1][..., 9] = 1.0, 1.0 - 6e-8

    def run(leaves):
        return [attend(triton_train.parallel, case, leaves, valid)]

    *_, dalpha = with_gradients(run, leaves, [grad])
    assert (dalpha[..., [5, 9]] == 0).all() and (dalpha[..., [4, 6]] != 0).all()


def test_views_give_the_same_numbers(small_tiles):
    case = replace(CASES[2], bias=True)
    leaves, valid, grad = attention_inputs(case, torch.float32)
    views = [leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves]
    assert not views[0].is_contiguous()

    def run(leaves):
        return [attend(triton_train.parallel, case, leaves, valid)]

    for a, b in zip(
        with_gradients(run, leaves, [grad]),
        with_gradients(run, views, [grad.transpose(-1, -2).contiguous().transpose(-1, -2)]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_keys_of_another_dtype_follow_the_query(small_tiles):
    case = Case(tokens=7, delay=2)
    leaves, valid, grad = attention_inputs(case, torch.bfloat16)
    leaves[1], leaves[4] = leaves[1].float(), leaves[4].float()

    def run(leaves):
        return [attend(triton_train.parallel, case, leaves, valid)]

    out, *gradients = with_gradients(run, leaves, [grad])
    assert out.dtype == torch.bfloat16
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves]


def test_nothing_is_allocated_in_the_square_of_the_tokens(poisoned_memory, small_tiles):
    case = Case(tokens=70, delay=4)
    leaves, valid, grad = attention_inputs(case, torch.float32)
    poisoned_memory.clear()
    with_gradients(
        lambda leaves: [attend(triton_train.parallel, case, leaves, valid)], leaves, [grad]
    )
    assert poisoned_memory and max(poisoned_memory) == BATCH * case.tokens * case.dim


@pytest.mark.parametrize(
    ("dtype", "dim", "told"),
    [(torch.float64, 16, "bfloat16, float16 and float32"), (torch.float32, 512, "up to 256")],
)
def test_refuses_what_it_cannot_do(dtype, dim, told):
    case = Case(tokens=1, dim=dim)
    leaves, valid, _ = attention_inputs(case, dtype)
    with pytest.raises(ValueError, match=told):
        attend(triton_train.parallel, case, leaves, valid)


def test_a_bias_is_no_reason_to_refuse():
    case = Case(tokens=7, bias=True)
    leaves, valid, _ = attention_inputs(case, torch.float32)
    reason = "it runs on a GPU, not on cpu" if DEVICE == "cpu" else ""
    assert attend(triton_backend.BACKEND.supports, case, leaves, valid) == (not reason, reason)


@pytest.mark.skipif(not INTERPRETED, reason="the examples are on the CPU")
@pytest.mark.parametrize(
    "name", ["triton_scan", "triton_train", "triton_train_bwd", "triton_train_tiles"]
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.attention.{name}"))
    assert result.attempted and not result.failed
