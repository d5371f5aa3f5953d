"""Rows of the prefill benchmark, and peak memory."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from cachefold.benchmark import memory, prefill
from cachefold.benchmark.config import BenchConfig

MEBI = 2**20


def _config(base, **changes):
    options = {"batch": (2,), "context": (96,), "cr": (2.0, 4.0), "repeats": 2}
    return BenchConfig(
        parts=("prefill",), model=str(base), backend="reference", dtype=("float32",),
        **{**options, **changes},
    )  # fmt: skip


def test_rows(base, pair, monkeypatch):
    jobs = []

    def fake(config, dtype, batch, context, cr):
        jobs.append(cr)
        return {"peak_bytes": 100 + cr, "cache_bytes": 10, "cr_kept": cr, "method": "none"}

    monkeypatch.setattr(prefill, "_in_own_process", fake)
    rows = list(prefill.measure(_config(base), [pair]))
    assert [row["cr"] for row in rows] == [2.0, 4.0] and sorted(jobs) == [0.0, 2.0, 4.0]
    for row in rows:
        assert row["ms"] == row["folded_float32_ms"] and row["dense_ms"] == row["dense_float32_ms"]
        assert row["peak_bytes"] == 100 + row["cr"] and row["dense_peak_bytes"] == 100
        assert row["tokens_per_s"] == pytest.approx(2 * 96 / row["ms"] * 1e3)
        assert row["dense_variant"] == "float32" and row["cr_imposed"]
        assert row["backend"] == "reference" and row["dtype"] == "float32"


def test_a_process_of_its_own(base):
    found = prefill._in_own_process(_config(base), "float32", 1, 300, 4.0)
    assert found["cr_kept"] == pytest.approx(4.0, rel=0.01)
    assert found["peak_bytes"] > 0 and 0 < found["cache_bytes"] < 300 * 2 * 2 * 16 * 4


def test_the_process_measures_the_model_that_is_timed(base):
    plain, sized = (
        prefill._in_own_process(_config(base, proportional=sizes), "float32", 1, 300, 4.0)
        for sizes in (False, True)
    )
    # One number more beside the 2 x 16 of an entry, and pages may not come out even.
    assert sized["cache_bytes"] > 1.02 * plain["cache_bytes"]


def test_a_failed_process_says_why(base, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho 'ValueError: no room' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(prefill.sys, "executable", str(program))
    with pytest.raises(RuntimeError, match="200 tokens.*ValueError: no room"):
        prefill._in_own_process(_config(base), "float32", 1, 200, 4.0)


def test_dense_peak_in_this_process(base):
    job = prefill.Prefill(
        model=str(base), dtype="float32", batch=1, context=200, cr=prefill.DENSE,
        backend="auto", threads=torch.get_num_threads(), seed=0,
    )  # fmt: skip
    found = prefill.peak_of(job)
    assert found["cache_bytes"] == 200 * 2 * 2 * 16 * 4 and found["cr_kept"] == 1.0
    assert asdict(job)["cr"] == 0.0


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_sees_what_is_freed_again(monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)

    def work() -> int:
        for _ in range(10):
            torch.ones(16 * MEBI).add_(1)  # 64 MiB, and freed
        return 7

    result, nbytes, method = memory.peak_bytes(work)
    assert result == 7 and 60 * MEBI < nbytes < 160 * MEBI
    assert ("every" in method) == sampled


def test_memory_freed_before_hides_nothing():
    def work() -> list[bytes]:
        return [b"x" * (64 * 1024 + i) for i in range(640)]  # 40 MiB in pieces that malloc keeps

    kept = work()
    fence = b"x" * 70_000
    del kept
    _, nbytes, _ = memory.peak_bytes(work)
    assert fence and nbytes > 38 * MEBI
