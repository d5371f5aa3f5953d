"""Prefill of whole prompts: time side by side, peak memory in a process of its own per variant.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cachefold.benchmark import imposed, memory
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.machine import device, set_threads
from cachefold.benchmark.models import Pair, make_pair
from cachefold.benchmark.parity import check_backend
from cachefold.benchmark.synthetic import Case
from cachefold.benchmark.timing import Times, contenders, elapsed_ms, interleave
from cachefold.models.fold import new_cache
from cachefold.zoo import load_base

DENSE = 0.0
"""Stands for the dense model where a ratio is expected."""
WARM_UP_TOKENS, WARM_UP_CR = 128, 2.0
PEAK_RUNS = 3
"""Processes that measure one peak, whose median counts: where large blocks land is chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """One prefill to measure in a process of its own."""

    model: str
    dtype: str
    batch: int
    context: int
    cr: float
    """Imposed; `DENSE` = the dense model."""
    backend: str
    threads: int
    seed: int
    proportional: bool = False
    """Entries are weighed by the tokens they hold."""


def measure(config: BenchConfig, pairs: list[Pair]) -> Iterator[dict[str, Any]]:
    """Times prefills and measures their peak memory.

    Yields:
        A row for each batch, context and cr.

    Raises:
        ParityError: the backend differs from the reference.
    """
    grid = config.grid("prefill")
    for context in grid.context:
        for batch in grid.batch:
            asked = Case(batch, context, grid.cr[-1], config.seed)
            backends = {
                pair.dtype: check_backend(
                    pair.shape, config.backend, getattr(torch, pair.dtype), device(), asked
                ).prefill
                for pair in pairs
            }  # fmt: skip
            times = _times(config, pairs, batch, context, grid.cr)
            peaks: dict[str, dict[str, Any]] = {}
            for ratio in grid.cr:
                row = _row(config, times, peaks, (batch, context, ratio))
                yield row | {"backend": backends[row["dtype"]]}


def _times(
    config: BenchConfig, pairs: list[Pair], batch: int, context: int, ratios: tuple[float, ...]
) -> dict[str, Times]:
    """Times by variant; one that can't win any more is timed once only."""
    runs: dict[str, Callable[[], object]] = {}
    for pair in pairs:
        ids = imposed.random_ids(pair.dense, batch, context, config.seed)
        runs[f"dense {pair.dtype}"] = partial(_dense, pair.dense, ids)
        for ratio in ratios:
            imposition = _imposition(pair, batch, context, ratio, config.seed)
            runs[f"folded {ratio:g} {pair.dtype}"] = partial(
                _folded, pair.folded, ids, imposition, config.backend
            )
    for pair in pairs:  # compiles kernels
        ids = imposed.random_ids(pair.dense, batch, WARM_UP_TOKENS, config.seed)
        _dense(pair.dense, ids)
        _folded(
            pair.folded,
            ids,
            _imposition(pair, batch, WARM_UP_TOKENS, WARM_UP_CR, config.seed),
            config.backend,
        )
    warm = {name: elapsed_ms(run) for name, run in runs.items()}
    groups = ["dense ", *(f"folded {ratio:g} " for ratio in ratios)]
    running = set().union(*(contenders(warm, group, slower=1.5) for group in groups))
    rest = {name: Times([ms]) for name, ms in warm.items() if name not in running}
    repeats = config.grid("prefill").repeats
    return rest | interleave(
        {name: runs[name] for name in runs if name in running}, repeats, before=gc.collect
    )


def _imposition(pair: Pair, batch: int, tokens: int, ratio: float, seed: int) -> imposed.Imposition:
    lengths = imposed.layer_lengths(pair.folded, pair.shape, batch, tokens, ratio, seed)
    return imposed.Imposition(pair.folded, lengths, tokens, 0, ratio, seed)


@torch.no_grad()
def _dense(model: Any, ids: Tensor) -> Any:
    """Reads the prompt into a DynamicCache, as generate() does."""
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def _folded(model: Any, ids: Tensor, imposition: imposed.Imposition, backend: str) -> Any:
    """Reads the prompt into a folded cache."""
    imposition.restart()
    cache = new_cache(model, backend=backend)
    with imposition.active():
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def _row(
    config: BenchConfig, times: dict[str, Times], peaks: dict[str, dict[str, Any]],
    place: tuple[int, int, float],
) -> dict[str, Any]:  # fmt: skip
    batch, context, ratio = place
    group = f"folded {ratio:g} "
    ours = {name: one for name, one in times.items() if name.startswith(group)}
    dense = {name: one for name, one in times.items() if name.startswith("dense ")}
    for name in (*ours, *dense):
        if name not in peaks:
            cr = DENSE if name in dense else ratio
            peaks[name] = _in_own_process(config, name.rpartition(" ")[2], batch, context, cr)
    best, rival = (min(some, key=lambda n: some[n].median) for some in (ours, dense))
    dtype = best.removeprefix(group)
    per_dtype = {}
    for name in (*ours, *dense):
        key = name.replace(group, "folded ").replace(" ", "_")
        per_dtype[f"{key}_ms"] = times[name].median
        per_dtype[f"{key}_peak_bytes"] = peaks[name]["peak_bytes"]
    return {
        "kind": "prefill", "batch": batch, "context": context, "cr": ratio, "cr_imposed": True,
        "cr_kept": peaks[best]["cr_kept"], "dtype": dtype,
        "ms": times[best].median, "ms_low": times[best].low, "ms_high": times[best].high,
        "tokens_per_s": 1e3 * batch * context / times[best].median,
        "dense_ms": times[rival].median, "dense_variant": rival.removeprefix("dense "),
        "speedup_dense": times[rival].median / times[best].median,
        # Of the same dtype: the winner may take a wider one than the dense winner.
        "peak_bytes": peaks[best]["peak_bytes"],
        "dense_peak_bytes": peaks[f"dense {dtype}"]["peak_bytes"],
        "cache_bytes": peaks[best]["cache_bytes"],
        "dense_cache_bytes": peaks[f"dense {dtype}"]["cache_bytes"],
        "memory_method": peaks[best]["method"], **per_dtype, "repeats": len(times[best].ms),
    }  # fmt: skip


def _in_own_process(
    config: BenchConfig, dtype: str, batch: int, context: int, cr: float
) -> dict[str, Any]:
    """Peak memory of one prefill: the process in the middle of several.

    Raises:
        RuntimeError: a process failed, for want of memory for example.
    """
    job = Prefill(
        model=config.model, dtype=dtype, batch=batch, context=context, cr=cr,
        backend=config.backend, threads=torch.get_num_threads(), seed=config.seed,
        proportional=config.proportional,
    )  # fmt: skip
    command = [sys.executable, "-m", "cachefold.benchmark.prefill", json.dumps(asdict(job))]
    found = []
    for _ in range(PEAK_RUNS):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["killed, perhaps for want of memory"]
            raise RuntimeError(
                f"the prefill of {context} tokens in a process of its own: {last[0]}"
            )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return sorted(found, key=lambda one: one["peak_bytes"])[PEAK_RUNS // 2]


def peak_of(job: Prefill) -> dict[str, Any]:
    """Loads a model, warms it up and measures the memory of one prefill, in this process."""
    set_threads(job.threads)
    base, _ = load_base(job.model, getattr(torch, job.dtype))
    moved: Any = base.to(device())  # type: ignore[arg-type]  # transformers' stub
    pair = make_pair(moved, job.dtype, proportional=job.proportional)

    def prefill(tokens: int, cr: float) -> Callable[[], Any]:
        ids = imposed.random_ids(pair.dense, job.batch, tokens, job.seed)
        if cr == DENSE:
            return partial(_dense, pair.dense, ids)
        imposition = _imposition(pair, job.batch, tokens, cr, job.seed)
        return partial(_folded, pair.folded, ids, imposition, job.backend)

    for parameter in pair.dense.parameters():
        parameter.sum()  # rows that no token has asked for may still lie in the file only
    prefill(WARM_UP_TOKENS, DENSE if job.cr == DENSE else WARM_UP_CR)()
    cache, peak, method = memory.peak_bytes(prefill(job.context, job.cr))
    if job.cr == DENSE:
        kept, nbytes = 1.0, memory.dense_cache_bytes(cache)
    else:
        kept, nbytes = cache.compression_ratio(), cache.allocated_nbytes()
    return {"peak_bytes": peak, "method": method, "cr_kept": kept, "cache_bytes": nbytes}


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    print(json.dumps(peak_of(Prefill(**json.loads(sys.argv[1])))))
