"""Triton's pooling scan against the reference, forward and gradient.

`test_triton_train` runs this module in Triton's interpreter, `test_triton_train_gpu` on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from cachefold.attention import triton_scan
from cachefold.core import merging
from tests.attention.triton_gradients import (
    BATCH,
    DEVICE,
    HALVES,
    TOLERANCES,
    assert_near,
    draw_alpha,
    drawer,
    with_gradients,
)
from tests.attention.watch import poison


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    return poison(monkeypatch)


def check_scan(tokens, dim, value_dim, kind, window, dtype=torch.float32):
    draw = drawer(tokens)
    shape = BATCH, 1, tokens
    key, value = draw(*shape, dim).to(DEVICE, dtype), draw(*shape, value_dim).to(DEVICE, dtype)
    alpha, omega = draw_alpha(draw, kind, *shape), torch.sigmoid(draw(*shape)) + 0.01
    leaves = [key, value, alpha.to(DEVICE, torch.float32), omega.to(DEVICE, torch.float32)]
    grads = [draw(*shape, dim), draw(*shape, value_dim), draw(*shape)]
    grads = [grad.to(DEVICE) for grad in grads]

    def run(means):
        return lambda leaves: means(*leaves, window)

    actual = with_gradients(run(triton_scan.running_means), leaves, grads)
    double = [leaf.double() for leaf in leaves]
    expected = with_gradients(run(merging.running_means), double, grads)
    assert [a.dtype for a in actual[:3]] == [torch.float32] * 3
    assert [a.dtype for a in actual[3:]] == [leaf.dtype for leaf in leaves]
    # Everything is computed in float32; half precision rounds the gradients of x once, at the end.
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        tolerance = TOLERANCES[dtype] if i in (3, 4) else TOLERANCES[torch.float32]
        assert_near([a], [e], tolerance)


@pytest.mark.parametrize(
    ("tokens", "dim", "value_dim", "kind", "window"),
    [
        (1, 16, 16, "soft", None),
        (7, 64, 16, "hard", None),
        (33, 80, 64, "soft", None),
        (70, 16, 16, "merge", None),
        (70, 16, 16, "hard", None),
        (70, 16, 16, "append", None),
        (1, 16, 16, "soft", 12),
        (7, 64, 16, "soft", 2),
        (33, 16, 16, "soft", 1),
        (33, 80, 16, "hard", 12),
        (70, 16, 16, "soft", 12),
        (70, 16, 16, "mild", 40),
        (33, 16, 16, "append", 12),
    ],
)
def test_scan_equals_reference(tokens, dim, value_dim, kind, window):
    check_scan(tokens, dim, value_dim, kind, window)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_scan_equals_reference(dtype, window):
    check_scan(20, 16, 16, "soft", window, dtype)


def test_scan_refuses_float64():
    x, weight = torch.ones(1, 1, 2, 4, dtype=torch.float64), torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="core.merging.running_means"):
        triton_scan.running_means(x, x, weight, weight)
