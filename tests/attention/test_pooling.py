"""Which scan pools a text."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachefold.attention import pooling
from cachefold.attention.triton_backend import BACKEND
from cachefold.core import merging


def test_on_a_cpu_it_is_that_of_core() -> None:
    torch.manual_seed(0)
    x = *torch.randn(2, 1, 3, 40, 8), *torch.rand(2, 1, 3, 40)
    for got, want in zip(pooling.running_means(*x, 5), merging.running_means(*x, 5), strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both scans say their names."""
    scan = SimpleNamespace(running_means=lambda *_: "triton")
    monkeypatch.setitem(sys.modules, "cachefold.attention.triton_scan", scan)
    monkeypatch.setattr("cachefold.attention.triton_scan", scan, raising=False)
    monkeypatch.setattr(merging, "running_means", lambda *_: "core")


@pytest.mark.usefixtures("scans")
@pytest.mark.parametrize(
    ("device", "wide", "there", "taken"),
    [
        ("cuda", None, True, "triton"),
        ("cuda", None, False, "core"),
        ("cpu", None, True, "core"),
        *(("cuda", i, True, "core") for i in range(4)),
    ],
)
def test_a_gpu_takes_the_kernels_that_are_there(
    device: str, wide: int | None, there: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (BACKEND if there else None, "")
    monkeypatch.setattr(pooling, "load_backend", {"triton": found}.__getitem__)
    dtypes = [torch.float64 if i == wide else torch.float32 for i in range(4)]
    tensors: list[Any] = [SimpleNamespace(device=torch.device(device), dtype=d) for d in dtypes]
    assert pooling.running_means(*tensors) == taken
