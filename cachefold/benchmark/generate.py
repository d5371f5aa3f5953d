"""Whole decode of a model: folded at imposed ratios beside dense transformers.

The dense model runs with a preallocated StaticCache and with a DynamicCache, in every dtype; the
fastest of them is the one that counts, and so is the faster dtype of the folded model. Every
variant decodes greedily, token by token, with the same loop.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from cachefold.benchmark import imposed
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.machine import Bandwidth, available_bytes, device
from cachefold.benchmark.models import Pair
from cachefold.benchmark.parity import check_backend
from cachefold.benchmark.synthetic import Case
from cachefold.benchmark.timing import Times, contenders, elapsed_ms, interleave

MEMORY_SHARE = 0.8
"""Of the free memory, that all caches of a loop may take."""


@dataclass(slots=True)
class Decoder:
    """One model with one cache; each visit decodes some tokens."""

    model: Any
    cache: Any
    ids: Tensor
    """(B, 1) the next token."""
    steps: int
    imposition: imposed.Imposition | None = None

    def visit(self) -> None:
        """Decodes `steps` tokens greedily."""
        if self.imposition is None:
            self._decode()
        else:
            with self.imposition.active():
                self._decode()

    @torch.no_grad()
    def _decode(self) -> None:
        for _ in range(self.steps):
            logits = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits
            self.ids = logits[:, -1].argmax(-1, keepdim=True)


def measure(
    config: BenchConfig, pairs: list[Pair], bandwidth: Bandwidth
) -> Iterator[dict[str, Any]]:
    """Times whole decode steps.

    Yields:
        A row for each batch, context and cr.

    Raises:
        ParityError: the backend differs from the reference.
        ValueError: caches that don't fit into memory.
    """
    grid = config.grid("generate")
    for context in grid.context:
        for batch in grid.batch:
            asked = Case(batch, context, grid.cr[-1], config.seed)
            backends = {
                pair.dtype: check_backend(
                    pair.shape, config.backend, getattr(torch, pair.dtype), device(), asked
                ).decode
                for pair in pairs
            }  # fmt: skip
            for ratios in _loops(pairs, batch, context, grid.cr):
                for row in _measure(config, pairs, batch, context, ratios, bandwidth):
                    yield row | {"backend": backends[row["dtype"]]}


def _loops(
    pairs: list[Pair], batch: int, context: int, ratios: tuple[float, ...]
) -> list[tuple[float, ...]]:
    """All ratios in one loop where their caches fit into memory, else each in one of its own."""
    room = MEMORY_SHARE * available_bytes()
    choices: list[list[tuple[float, ...]]] = [[ratios], [(ratio,) for ratio in ratios]]
    for loops in choices:
        # Static and dynamic; the dynamic one is copied as it grows, one layer at a time.
        needed = [sum(2.2 + sum(1 / ratio for ratio in loop) for _ in pairs) for loop in loops]
        dense = sum(_dense_nbytes(pair, batch, context) for pair in pairs) / len(pairs)
        if max(needed) * dense <= room:
            return loops
    raise ValueError(
        f"the dense caches of {batch} x {context} tokens don't fit into memory ({room / 1e9:.1f} "
        "GB may be used): choose a smaller --batch or --context, or a single --dtype"
    )


def _dense_nbytes(pair: Pair, batch: int, tokens: int) -> int:
    shape = pair.shape
    item = torch.empty((), dtype=getattr(torch, pair.dtype)).element_size()
    return 2 * item * shape.layers * batch * tokens * shape.kv_heads * shape.head_dim


def _measure(
    config: BenchConfig, pairs: list[Pair], batch: int, context: int, ratios: tuple[float, ...],
    bandwidth: Bandwidth,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One interleaved loop; a variant that can't win any more is timed once only."""
    repeats = config.grid("generate").repeats
    decoders = _decoders(config, pairs, batch, context, ratios, repeats)
    visits: dict[str, Callable[[], None]] = {name: d.visit for name, d in decoders.items()}
    for visit in visits.values():
        visit()  # compiles kernels and fills the processor's caches
    warm = {name: elapsed_ms(visit) for name, visit in visits.items()}
    groups = ["dense ", *(f"folded {ratio:g} " for ratio in ratios)]
    running = set().union(*(contenders(warm, group) for group in groups))
    rest = {name: Times([ms]) for name, ms in warm.items() if name not in running}
    times = interleave({name: visits[name] for name in visits if name in running}, repeats)
    per_step = {name: one.per(config.steps) for name, one in (rest | times).items()}
    for ratio in ratios:
        yield _row(config, pairs, decoders, per_step, (batch, context, ratio), bandwidth)


def _decoders(
    config: BenchConfig, pairs: list[Pair], batch: int, context: int, ratios: tuple[float, ...],
    repeats: int,
) -> dict[str, Decoder]:  # fmt: skip
    more, found = config.steps * (repeats + 2), {}
    for pair in pairs:
        first = imposed.random_ids(pair.dense, batch, 1, config.seed)
        for ratio in ratios:
            cache, imposition = imposed.filled_cache(
                pair.folded, pair.shape, batch, context, ratio, more, backend=config.backend,
                seed=config.seed,
            )  # fmt: skip
            found[f"folded {ratio:g} {pair.dtype}"] = Decoder(
                pair.folded, cache, first, config.steps, imposition
            )
        dense_config = pair.dense.config
        caches = {
            "static": StaticCache(config=dense_config, max_cache_len=context + more),
            "dynamic": DynamicCache(config=dense_config),
        }
        for kind, dense in caches.items():
            imposed.fill_dense(dense, pair.dense, pair.shape, batch, context, config.seed)
            found[f"dense {kind} {pair.dtype}"] = Decoder(pair.dense, dense, first, config.steps)
    return found


def _row(
    config: BenchConfig, pairs: list[Pair], decoders: dict[str, Decoder], times: dict[str, Times],
    place: tuple[int, int, float], bandwidth: Bandwidth,
) -> dict[str, Any]:  # fmt: skip
    batch, context, ratio = place
    group = f"folded {ratio:g} "
    ours = {name: one for name, one in times.items() if name.startswith(group)}
    dense = {name: one for name, one in times.items() if name.startswith("dense ")}
    best, rival = (min(some, key=lambda n: some[n].median) for some in (ours, dense))
    pair = next(one for one in pairs if one.dtype == best.removeprefix(group))
    cache = decoders[best].cache
    floor = (pair.weight_nbytes + cache.nbytes()) / bandwidth.gbps / 1e6
    rate = {name: 1e3 * batch / one.median for name, one in times.items()}
    return {
        "kind": "generate", "batch": batch, "context": context, "cr": ratio, "cr_imposed": True,
        "cr_kept": cache.compression_ratio(), "dtype": pair.dtype, "tokens_per_s": rate[best],
        "tokens_per_s_low": 1e3 * batch / ours[best].high,
        "tokens_per_s_high": 1e3 * batch / ours[best].low,
        "dense_tokens_per_s": rate[rival], "dense_variant": rival.removeprefix("dense "),
        "speedup_dense": rate[best] / rate[rival],
        "cache_overhead": cache.allocated_nbytes() * cache.compression_ratio()
        / cache.dense_nbytes(),
        "cache_bytes": cache.allocated_nbytes(), "dense_cache_bytes": cache.dense_nbytes(),
        "roofline_ms": floor, "bandwidth_fraction": floor / ours[best].median,
        **{f"{name.replace(group, 'folded ').replace(' ', '_')}_tokens_per_s": rate[name]
           for name in (*ours, *dense)},
        "steps": config.steps, "repeats": len(ours[best].ms),
    }  # fmt: skip
