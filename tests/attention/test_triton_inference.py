"""Triton's prefill and decode without a GPU: in the interpreter, and compiled for cards.

Both in processes of their own: triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cachefold.attention.triton_backend import BACKEND

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
KIB = 1024
# Shared memory that one program gets: sm_86 has least of the cards of NVIDIA.
LIMITS = {"sm_80": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}


def run(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_equal_the_reference_in_the_interpreter():
    cases = str(Path(__file__).with_name("triton_cases.py"))
    out = run("-m", "pytest", "--tb=short", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    assert "skipped" not in out


@pytest.mark.parametrize(
    ("target", "dtype", "dim", "page_size", "bias"),
    [
        ("sm_80", "bfloat16", 128, 16, "plain"),
        ("sm_80", "bfloat16", 128, 16, "bias"),
        ("gfx942", "float32", 64, 32, "bias"),
        *(
            pytest.param(target, dtype, dim, 16, bias, marks=pytest.mark.slow)
            for target in LIMITS
            for dtype in ("bfloat16", "float32")
            for dim in (64, 128, 256)
            for bias in ("plain", "bias")
        ),
    ],
)
def test_kernels_compile_for_cards(target, dtype, dim, page_size, bias, tmp_path):
    out = run(
        __file__, target, dtype, str(dim), str(page_size), bias, TRITON_INTERPRET=None,
        TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    kernels = json.loads(out)
    names = ("fold_fwd_kernel", "decode_fwd_kernel", "combine_fwd_kernel", "prefill_fwd_kernel")
    assert sorted(kernels) == sorted(names)
    for name, (shared, _, assembly) in kernels.items():
        assert shared <= LIMITS[target], name
        if target != "gfx942" and name in ("decode_fwd_kernel", "prefill_fwd_kernel"):
            # Keys and values travel 16 bytes at a time, in the background.
            assert "cp.async.cg.shared.global" in assembly
    # Threads read what others write: behind the barrier only the block table (int32) is read.
    before, after = re.split(r"barrier all|gpu\.barrier", kernels["fold_fwd_kernel"][1], maxsplit=1)
    assert not re.search(r"tt\.store|buffer_store", before) and "tt.store" in after
    loads = re.findall(r"(?:tt\.load|buffer_load) .*", after)
    assert loads and all("!tt.ptr<i32>" in load for load in loads)


def compile_kernels(target, dtype, dim, page_size, proportional):
    """Shared memory (bytes), IR and assembly of each kernel that a step and a prefill launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from tests.attention import triton_cases

    class NoDriver:
        def get_current_target(self):
            if target == "gfx942":
                return GPUTarget("hip", target, 64)
            return GPUTarget("cuda", int(target[3:]), 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    kernels, launch = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        kernels[self.fn.__name__] = compiled.metadata.shared, compiled.asm["ttgir"], assembly

    triton.runtime.driver.set_active(NoDriver())
    JITFunction.run = compile_only
    if target == "gfx942":
        torch.version.hip = "6"
    case = triton_cases.Case(
        dim=dim, value_dim=dim, rotary_dim=dim, page_size=page_size, factors=True, softcap=5.0,
        proportional=proportional,
    )  # fmt: skip
    BACKEND.step(triton_cases.step_call(case, dtype))
    BACKEND.attend(triton_cases.paged_call(replace(case, queries=100), dtype))
    # A long text is split among more programs than one pass of the last kernel takes in.
    BACKEND.step(triton_cases.step_call(replace(case, batch=1, kv_heads=1, columns=400), dtype))
    return kernels


def test_unsupported_calls_are_refused_with_the_reason():
    from tests.attention import triton_cases

    case = triton_cases.Case(dim=16, value_dim=16, rotary_dim=16)
    step = triton_cases.step_call(case, torch.float32)
    paged = triton_cases.paged_call(replace(case, queries=2), torch.float32)
    wide = triton_cases.Case(dim=272, value_dim=16, rotary_dim=16)
    many = replace(case, groups=65)
    ring = step.ring
    odd = replace(ring, key=ring.key.transpose(0, 1).contiguous().transpose(0, 1))
    reasons = {
        "float64": replace(paged, exact_key=paged.exact_key.double()),
        "16 or 32 entries, not 8": replace(step, page_size=8),
        "not 272 and 16": triton_cases.paged_call(wide, torch.float32),
        "at most 64": triton_cases.step_call(many, torch.float32),
        "contiguous": replace(step, ring=odd),
        "side by side": replace(paged, pages=paged.pages.t().contiguous().t()),
    }
    if triton_cases.DEVICE == "cpu":
        reasons["on a GPU, not on cpu"] = step
    for reason, call in reasons.items():
        ok, text = BACKEND.supports(call)
        assert not ok and reason in text


@pytest.mark.parametrize("make", ["step_call", "paged_call"])
def test_calls_with_a_bias_on_entries_are_refused_only_off_the_gpu(make):
    from tests.attention import triton_cases

    case = triton_cases.Case(dim=256, value_dim=256, proportional=True)
    ok, text = BACKEND.supports(getattr(triton_cases, make)(case, torch.bfloat16))
    if triton_cases.DEVICE == "cpu":
        assert not ok and text == "it runs on a GPU, not on cpu"
    else:
        assert ok


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    ok, reason = BACKEND.available()
    assert not ok and "GPU" in reason


def test_without_triton_the_backend_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BACKEND.available() == (False, "triton is not installed")


if __name__ == "__main__":
    target, dtype, dim, page_size, bias = sys.argv[1:]
    kernels = compile_kernels(
        target, getattr(torch, dtype), int(dim), int(page_size), bias == "bias"
    )
    print(json.dumps(kernels))
