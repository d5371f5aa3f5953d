"""Random texts for the cache, and what a token-by-token recurrence makes of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch

from cachefold.attention import reference
from cachefold.attention.call import StepCall
from cachefold.cache import FoldedLayer, Stream
from cachefold.cache.entries import PagedEntries
from cachefold.cache.packed_entries import PackedEntries
from cachefold.core.pages import gather
from cachefold.core.tokens import Tokens

HEADS, DIM, ROTARY = 2, 6, 4


@dataclass
class Text:
    """Random inputs of a layer, float64."""

    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    alpha: torch.Tensor
    omega: torch.Tensor
    valid: torch.Tensor

    def part(self, start: int, stop: int) -> list[torch.Tensor]:
        long = (self.key, self.value, self.cos, self.sin, self.alpha, self.omega, self.valid)
        return [x[:, start:stop] if x is self.cos or x is self.sin or x is self.valid
                else x[:, :, start:stop] for x in long]  # fmt: skip


def make_text(
    seed: int, tokens: int, padding: list[int], merge_rate: float, trailing: int = 0
) -> Text:
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    draw = {"generator": generator, "dtype": torch.float64}
    angle = torch.rand(batch, tokens, ROTARY // 2, **draw) * 6
    angle = torch.cat([angle, angle], -1)
    valid = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    if trailing:
        valid[-1, -trailing:] = False
    return Text(
        torch.randn(batch, HEADS, tokens, DIM, **draw),
        torch.randn(batch, HEADS, tokens, DIM, **draw),
        angle.cos(),
        angle.sin(),
        (torch.rand(batch, HEADS, tokens, **draw) < merge_rate).double(),
        torch.rand(batch, HEADS, tokens, **draw) * 0.9 + 0.1,
        valid,
    )


def turn(x: list[float], cos: list[float], sin: list[float]) -> list[float]:
    """Rotary embedding of one vector, pairs (c, c + ROTARY/2), written out."""
    half, out = ROTARY // 2, list(x)
    for c in range(half):
        out[c] = x[c] * cos[c] - x[c + half] * sin[c]
        out[c + half] = x[c + half] * cos[c + half] + x[c] * sin[c + half]
    return out


def expected_rows(
    text: Text, b: int, k: int, i: int, delay: int, window: int | None
) -> list[list[float]]:
    """What query i sees: entries in order, then the exact tokens; rows are rotated key + value."""
    entries: list[list[int]] = []
    for j in range(i - delay + 1):
        if not text.valid[b, j]:
            continue
        can_merge = j > 0 and bool(text.valid[b, j - 1])
        if can_merge and text.alpha[b, k, j] == 1:
            entries[-1].append(j)
        else:
            entries.append([j])
    rows = []
    for entry in entries:
        members = entry if window is None else entry[-window:]
        weight = sum(text.omega[b, k, j].item() for j in members)
        mean = [
            [sum(text.omega[b, k, j].item() * x[b, k, j, d].item() for j in members) / weight
             for d in range(DIM)] for x in (text.key, text.value)
        ]  # fmt: skip
        cos, sin = text.cos[b, entry[-1]].tolist(), text.sin[b, entry[-1]].tolist()
        rows.append(turn(mean[0], cos, sin) + mean[1])
    for j in range(max(i - delay + 1, 0), i + 1):
        if text.valid[b, j]:
            cos, sin = text.cos[b, j].tolist(), text.sin[b, j].tolist()
            rows.append(turn(text.key[b, k, j].tolist(), cos, sin) + text.value[b, k, j].tolist())
    return rows


def stream_rows(stream: Stream, b: int, k: int, row: int, delay: int) -> list[list[float]]:
    """What new token `row` (negative: from the end) sees, by the contract with attention."""
    num_new, num_exact = stream.visible.shape[2], stream.exact.valid.shape[1]
    row %= num_new
    page_size = stream.pages.shape[1] // (2 * DIM)
    key, value = gather(stream.pages, page_size, DIM, stream.table)
    rows = [
        key[b, k, slot].tolist() + value[b, k, slot].tolist()
        for slot in range(int(stream.visible[b, k, row]))
    ]

    def turned(run: Tokens, j: int) -> list[float]:
        cos, sin = run.cos[b, j].tolist(), run.sin[b, j].tolist()
        return turn(run.key[b, k, j].tolist(), cos, sin) + run.value[b, k, j].tolist()

    if stream.open.valid[b, row]:
        rows.append(turned(stream.open, row))
    last = num_exact - num_new + row
    for j in range(max(last - delay + 1, 0), last + 1):
        if stream.exact.valid[b, j]:
            rows.append(turned(stream.exact, j))
    return rows


def run_step(
    layer: FoldedLayer, text: Text, i: int, size_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Token i by a step in place, by the reference; (B, HEADS, DIM), every channel asked for 1."""
    poison(layer)
    new = Tokens(*text.part(i, i + 1))
    if size_weight is not None:
        new = replace(new, size=torch.ones_like(new.omega))
    query = torch.ones(len(text.valid), HEADS, 1, DIM, dtype=torch.float64)

    def run(layer: FoldedLayer) -> torch.Tensor:
        return reference.step(
            StepCall(
                query=query, new=new, ring=layer.ring, turn=layer.turn, tail=layer.tail,
                pages=layer.closed.pool.data, page_size=layer.page_size,
                table=layer.closed.table, lengths=layer.closed.lengths, scaling=1.0,
                size_weight=size_weight,
            )
        )  # fmt: skip

    return layer.step(new, run)[:, :, 0]


def expected_step(
    text: Text, b: int, k: int, i: int, delay: int, window: int | None = None
) -> torch.Tensor:
    """(DIM,) what `run_step` gives a request and head."""
    rows = as_rows(expected_rows(text, b, k, i, delay, window))
    query = as_rows([turn([1.0] * DIM, text.cos[b, i].tolist(), text.sin[b, i].tolist())])[0]
    return torch.softmax(rows[:, :DIM] @ query, 0) @ rows[:, DIM:]


def as_rows(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def poison(layer: FoldedLayer) -> None:
    """NaN into every buffer slot that holds no entry."""
    if layer.closed is not None:
        poison_pages(layer.closed)


def poison_pages(entries: PagedEntries) -> None:
    """NaN into every slot of the pool that holds no entry, in free pages and in owned ones."""
    pool, table = entries.pool, entries.table
    used = torch.zeros(pool.num_pages, pool.page_size, dtype=torch.bool)
    for head, length in zip(table.flatten(0, 1), entries.lengths.flatten().tolist(), strict=True):
        for slot in range(length):
            used[head[slot // pool.page_size], slot % pool.page_size] = True
    pool.keys.transpose(1, 2)[~used] = math.nan
    pool.values[~used] = math.nan


def poison_packed(entries: PackedEntries) -> None:
    """Garbage into every place that holds no entry."""
    held = entries.lengths - entries.lists.lengths
    empty = torch.arange(entries.exact["key"].shape[2]) >= held[..., None]
    for part in entries.exact.values():
        part[empty] = math.nan
    free = sorted(set(range(entries.lists.pool.num_pages))
                  - set(entries.lists.table[entries.lists.table >= 0].tolist()))  # fmt: skip
    entries.lists.pool.data[free] = 255


def feed(layer: FoldedLayer, text: Text, bounds: list[int], check=None):
    for start, stop in itertools.pairwise(bounds):
        poison(layer)
        stream = layer.extend(Tokens(*text.part(start, stop)))
        if check is not None:
            check(stream, start, stop)
    return stream


def cut(tokens: int, sizes: list[int]) -> list[int]:
    bounds = [0]
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + sizes[(len(bounds) - 1) % len(sizes)], tokens))
    return bounds
