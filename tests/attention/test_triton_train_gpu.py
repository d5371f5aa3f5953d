"""Triton's training kernels on a GPU: the cases of the interpreter, and what takes a large one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from cachefold.attention import blocked, triton_train
from tests.attention.triton_gradients import DEVICE, TOLERANCES, assert_near, with_gradients
from tests.attention.triton_scan_cases import *  # noqa: F403
from tests.attention.triton_scan_cases import check_scan
from tests.attention.triton_train_cases import *  # noqa: F403
from tests.attention.triton_train_cases import Case, attend, attention_inputs, check_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GIB = 1024**3


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_long_text_equals_reference(dim, dtype):
    case = Case(tokens=1100, group=3, kv_heads=2, dim=dim, value_dim=dim, padding=100)
    check_attention(case, dtype)


@pytest.mark.parametrize("window", [None, 12, 100])
def test_scan_of_a_long_text_equals_reference(window):
    check_scan(1100, 128, 128, "soft", window)


def test_memory_grows_with_the_tokens_not_with_their_square():
    peaks = []
    for tokens in (4096, 8192):
        case = Case(tokens=tokens, group=3, dim=64, value_dim=64)
        leaves, valid, grad = attention_inputs(case, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradients(
            lambda leaves, case=case, valid=valid: [
                attend(triton_train.parallel, case, leaves, valid)
            ],
            leaves,
            [grad],
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]


def test_addresses_beyond_32_bits():
    case = Case(tokens=64, group=64, dim=128, value_dim=128)
    batch = 2**31 // (case.tokens * case.group * case.dim) + 1
    if torch.cuda.get_device_properties(0).total_memory < 24 * GIB:
        pytest.skip("needs 24 GiB")
    leaves, valid, _ = attention_inputs(case, torch.bfloat16)
    many = [leaf[:1].expand(batch, *leaf.shape[1:]) for leaf in leaves]
    out = attend(triton_train.parallel, case, many, valid[:1].expand(batch, -1))
    expected = attend(blocked.parallel, case, [leaf.float() for leaf in leaves], valid)
    assert_near([out[-1]], [expected[0].double()], TOLERANCES[torch.bfloat16])


def test_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case(tokens=33)
    leaves, valid, _ = attention_inputs(case, torch.float32)
    expected = attend(triton_train.parallel, case, leaves, valid)
    second = [leaf.to("cuda:1") for leaf in leaves]
    actual = attend(triton_train.parallel, case, second, valid.to("cuda:1"))
    assert DEVICE == "cuda" and torch.equal(actual.to("cuda:0"), expected)
