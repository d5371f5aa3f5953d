"""Which scan pools a text."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachefold.attention import pooling
from cachefold.attention.triton_backend import TritonBackend
from cachefold.core import merging


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 3, 40, 8, dtype=dtype, device=device)
    return [*x, *torch.rand(2, 1, 3, 40, dtype=dtype, device=device)]


def test_on_a_cpu_it_is_that_of_core() -> None:
    for got, want in zip(
        pooling.running_means(*inputs(), 5), merging.running_means(*inputs(), 5), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("device", "dtype", "there", "taken"),
    [
        ("cuda", torch.float32, True, True),
        ("cuda", torch.float64, True, False),
        ("cuda", torch.float32, False, False),
        ("cpu", torch.float32, True, False),
    ],
)
def test_a_gpu_takes_the_kernels_that_are_there(
    device: str, dtype: torch.dtype, there: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = SimpleNamespace(running_means=lambda *_: "triton")
    monkeypatch.setitem(sys.modules, "cachefold.attention.triton_scan", scan)
    monkeypatch.setattr("cachefold.attention.triton_scan", scan, raising=False)
    monkeypatch.setattr(TritonBackend, "available", lambda self: (there, ""))
    monkeypatch.setattr(merging, "running_means", lambda *_: "core")
    some: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert pooling.running_means(some, some, some, some) == ("triton" if taken else "core")
