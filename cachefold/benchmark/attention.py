"""The decode attention call alone: folded, the same backend at cr 1, and torch's SDPA.

Every timed visit runs several independent copies of a layer, whose entries were put out of the
processor's caches before: in a model the weights of 30 layers pass between two visits of a cache.

Legend: B batch, H query heads, K kv heads, G = H / K, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cachefold.attention.call import PagedCall, StepCall
from cachefold.attention.dispatch import Backend, choose
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.machine import Bandwidth, Reader, device, last_level_cache
from cachefold.benchmark.parity import check_backend
from cachefold.benchmark.synthetic import Case, Shape, moved_nbytes, paged_call, step_call
from cachefold.benchmark.timing import Times, interleave

SDPA_DTYPES = (torch.bfloat16, torch.float32)
FEWEST_COPIES = 3
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Copies:
    """Independent layers of one variant, visited one after the other."""

    backend: Backend
    reading: Backend
    """Of attention alone; another one where `backend` has only steps."""
    calls: list[StepCall]
    reads: list[PagedCall]
    """The same entries as calls for attention alone."""
    nbytes: int
    """That one call must move."""
    kept: float
    """Entries of a head before the first step, mean over heads."""

    def step(self) -> None:
        """Decodes one token in every layer."""
        for call in self.calls:
            self.backend.step(call)

    def attend(self) -> None:
        """Attends in every layer and folds nothing."""
        for call in self.reads:
            self.reading.attend(call)


@dataclass(slots=True)
class Loop:
    """All variants of one batch and context, by name, with how many calls each makes."""

    copies: dict[float, Copies]
    variants: dict[str, Callable[[], object]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, run: Callable[[], object], count: int) -> None:
        """Takes a variant in and warms it up."""
        self.variants[name], self.counts[name] = run, count
        for _ in range(WARM_UP):
            run()


def measure(
    config: BenchConfig, shape: Shape, reader: Reader, bandwidth: Bandwidth
) -> Iterator[dict[str, Any]]:
    """Times the decode attention call.

    Args:
        config: what to measure.
        shape: of a layer.
        reader: empties the caches of the processor before every visit.
        bandwidth: of this machine.

    Yields:
        A row for each batch, context and cr; times are ms of one call of one layer.

    Raises:
        ParityError: the backend differs from the reference.
        ValueError: no such backend.
    """
    grid, dtype = config.grid("attention"), getattr(torch, config.dtype[0])
    for context in grid.context:
        for batch in grid.batch:
            for cr in grid.cr:
                asked = Case(batch, context, cr, config.seed)
                check_backend(shape, config.backend, dtype, device(), asked)
            loop = _loop(config, shape, batch, context, dtype)
            times = interleave(loop.variants, grid.repeats, before=reader.read)
            times = {name: times[name].per(loop.counts[name]) for name in times}
            for cr in grid.cr:
                yield _row(config, loop, times, batch, context, cr, bandwidth)


def _loop(config: BenchConfig, shape: Shape, batch: int, context: int, dtype: torch.dtype) -> Loop:
    grid = config.grid("attention")
    steps = grid.repeats + WARM_UP
    loop = Loop({})
    for cr in sorted({1.0, *grid.cr}):
        case = Case(batch, context, cr, config.seed)
        copies = loop.copies[cr] = _copies(shape, case, dtype, steps, config.backend)
        loop.add(f"folded {cr:g}", copies.step, len(copies.calls))
        loop.add(f"attend {cr:g}", copies.attend, len(copies.reads))
    for dense_dtype in SDPA_DTYPES:
        for packed in (False, True):
            name = f"sdpa{' packed' if packed else ''} {_short(dense_dtype)}"
            runs = _sdpa(shape, batch, context, dense_dtype, packed, config.seed)
            loop.add(name, partial(_all, runs), len(runs))
    return loop


def _copies(shape: Shape, case: Case, dtype: torch.dtype, steps: int, wanted: str) -> Copies:
    first = step_call(shape, case, dtype, device(), steps=steps)
    nbytes, calls = moved_nbytes(first), [first]
    for i in range(1, _count(nbytes, shape.layers)):
        other = replace(case, seed=case.seed + i)
        calls.append(step_call(shape, other, dtype, device(), steps=steps))
    reads = [paged_call(call) for call in calls]
    # Taken before any step: the entries grow by up to one with each.
    kept = float(first.lengths.float().mean()) + shape.delay + 1
    return Copies(choose(first, wanted), choose(reads[0], wanted), calls, reads, nbytes, kept)


def _count(nbytes: int, layers: int) -> int:
    """Copies of a layer: several times the last-level cache in all, but no more than layers."""
    enough = -(-4 * last_level_cache() // nbytes)
    return max(FEWEST_COPIES, min(layers, enough))


def _sdpa(
    shape: Shape, batch: int, context: int, dtype: torch.dtype, packed: bool, seed: int
) -> list[Callable[[], Tensor]]:
    """Attention of torch over dense layers that were allocated at once, one call per layer.

    Packed: the G query heads of a kv head as G rows of one query, which torch users seldom do.
    """
    generator = torch.Generator(device()).manual_seed(seed)
    size = (batch, shape.kv_heads, context, shape.head_dim)
    groups = shape.heads // shape.kv_heads
    rows = (shape.kv_heads, groups) if packed else (shape.heads, 1)
    item = torch.empty((), dtype=dtype).element_size()
    count = _count(2 * item * batch * shape.kv_heads * context * shape.head_dim, shape.layers)
    runs: list[Callable[[], Tensor]] = []
    for _ in range(count):
        key, value, query = (
            torch.randn(one, generator=generator, dtype=dtype, device=device())
            for one in (size, size, (batch, *rows, shape.head_dim))
        )
        runs.append(partial(scaled_dot_product_attention, query, key, value, enable_gqa=not packed))
    return runs


def _all(runs: list[Callable[[], Tensor]]) -> None:
    for run in runs:
        run()


def _row(
    config: BenchConfig, loop: Loop, times: dict[str, Times], batch: int, context: int, cr: float,
    bandwidth: Bandwidth,
) -> dict[str, Any]:  # fmt: skip
    copies, ours = loop.copies[cr], times[f"folded {cr:g}"]
    dense = times["folded 1"].median
    sdpa = {name: times[f"sdpa {name}"].median for name in map(_short, SDPA_DTYPES)}
    packed = min(times[f"sdpa packed {name}"].median for name in sdpa)
    best = min(sdpa, key=lambda name: sdpa[name])
    floor = copies.nbytes / bandwidth.gbps / 1e6
    return {
        "kind": "attention", "batch": batch, "context": context, "cr": cr, "cr_imposed": True,
        "cr_kept": context / copies.kept, "backend": copies.backend.name, "dtype": config.dtype[0],
        "ms": ours.median, "ms_low": ours.low, "ms_high": ours.high,
        "attend_ms": times[f"attend {cr:g}"].median, "dense_ms": dense,
        "sdpa_ms": sdpa[best], "sdpa_dtype": best,
        **{f"sdpa_{name}_ms": ms for name, ms in sdpa.items()}, "sdpa_packed_ms": packed,
        "speedup_dense": dense / ours.median, "speedup_sdpa": sdpa[best] / ours.median,
        "bytes": copies.nbytes, "roofline_ms": floor,
        "bandwidth_fraction": floor / ours.median, "layers": len(copies.calls),
    }  # fmt: skip


def roofline(row: dict[str, Any], bandwidth: Bandwidth) -> str:
    """Says how far a row is from what the memory allows.

    >>> roofline(
    ...     {"bytes": 3e6, "roofline_ms": 0.1, "ms": 0.2, "bandwidth_fraction": 0.5},
    ...     Bandwidth(30.0, "torch sum", {}))
    'roofline: 3.00 MB to move / 30.0 GB/s = 0.100 ms, measured 0.200 ms = 50 % of the bandwidth'
    """
    return (
        f"roofline: {row['bytes'] / 1e6:.2f} MB to move / {bandwidth.gbps:.1f} GB/s = "
        f"{row['roofline_ms']:.3f} ms, measured {row['ms']:.3f} ms = "
        f"{100 * row['bandwidth_fraction']:.0f} % of the bandwidth"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
