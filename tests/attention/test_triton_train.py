"""Triton's training kernels without a GPU: in the interpreter, and compiled for cards.

The interpreter in a process of its own: triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from cachefold.attention import triton_scan, triton_train, triton_train_bwd  # noqa: E402

ROOT = Path(__file__).parents[2]
KIB = 1024
# With the shared memory that one program gets. Consumer cards (sm_86, sm_89) run what is compiled
# for sm_80 with 99 KiB; block sizes are the same for all, so that must do for sm_90 too.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


def test_kernels_equal_the_references_in_the_interpreter():
    names = ("triton_train_cases.py", "triton_scan_cases.py")
    cases = [str(Path(__file__).with_name(name)) for name in names]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *cases],
        capture_output=True, text=True, env=os.environ | environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Launches compile for `compiled.target` instead and fill `compiled.kernels`, by name."""
    if triton.knobs.runtime.interpret:
        pytest.skip("triton interprets, so it does not compile")

    class Driver:
        kernels: dict[str, triton.compiler.CompiledKernel] = {}

        def get_current_target(self):
            return self.target

        def get_current_device(self):
            # A number of its own: triton keeps what it compiled by device, whatever the target.
            return 1000 + list(TARGETS.values()).index((self.target, self.limit))

        def get_current_stream(self, device):
            return 0

    driver, launch = Driver(), JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        kernel = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        driver.kernels[kernel.metadata.name] = kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, without the warning
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return driver


ATTENTION = {
    "parallel_fwd_kernel",
    "parallel_bwd_kernel_query",
    "parallel_bwd_kernel_columns",
}
SCAN = {"means_fwd_kernel", "means_bwd_kernel", "windowed_fwd_kernel", "windowed_bwd_kernel"}


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("target", "dtype", "dim"),
    [
        ("sm_80", torch.bfloat16, 64),
        *(
            pytest.param(target, dtype, dim, marks=pytest.mark.slow)
            for target in TARGETS
            for dtype in (torch.bfloat16, torch.float32)
            for dim in (64, 128, 256)
        ),
    ],
    ids=str,
)
def test_kernels_compile_for_cards_and_fit(target, dtype, dim, has_bias, compiled):
    compiled.target, compiled.limit = TARGETS[target]
    query, key = torch.zeros(1, 3, 40, dim, dtype=dtype), torch.zeros(1, 1, 40, dim, dtype=dtype)
    alpha, lse = torch.zeros(1, 1, 40), torch.zeros(1, 3, 40)
    valid, columns = torch.ones(1, 40, dtype=torch.int8), (key, key, key, key)
    biases, options = (alpha, alpha if has_bias else None), (16, 0.125, 50.0)
    triton_train.forward(query, columns, *biases, valid, *options)
    triton_train_bwd.backward(query, query, columns, *biases, valid, query, lse, *options)
    for window in (None, 12):
        leaf = key.clone().requires_grad_()
        triton_scan.running_means(leaf, key, alpha, alpha, window)[0].sum().backward()
    assert set(compiled.kernels) == ATTENTION | SCAN
    for name, kernel in compiled.kernels.items():
        assert kernel.metadata.shared <= compiled.limit, name
        if target != "gfx942" and name in ATTENTION:
            # Half precision goes through tensor cores; float32 keeps its digits.
            assert ("mma" in kernel.asm["ptx"]) == (dtype == torch.bfloat16), name
