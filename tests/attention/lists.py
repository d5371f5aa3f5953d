"""Random texts, and what each of their tokens sees by plain Python lists of entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachefold.attention.call import PagedCall, StepCall
from cachefold.core.pages import key_view, value_view
from cachefold.core.tokens import Tokens

HEADS, KV_HEADS, DIM, VALUE_DIM, ROTARY = 4, 2, 6, 4, 4
SCALING = 0.5
WEIGHTS = torch.tensor([0.5, 2.0], dtype=torch.float64)
"""Of the sizes of entries, for each kv head."""


@dataclass
class Text:
    """Queries and tokens of a batch, and how attention treats them; float64."""

    query: Tensor
    tokens: Tokens
    delay: int
    page_size: int
    softcap: float | None = None
    factors: Tensor | None = None
    size_weight: Tensor | None = None

    @property
    def entry_dim(self) -> int:
        """Channels of a key in the pages."""
        return DIM + (self.size_weight is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """B, T"""
        return self.tokens.valid.shape


def make_text(
    seed: int, batch: int, tokens: int, merge_rate: float, padding: list[tuple[int, int]],
    **options,
) -> Text:  # fmt: skip
    """`padding` holds start and stop of what is not valid, one for each request in turn."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    angle = torch.rand(batch, tokens, ROTARY // 2, **draw) * 6
    angle = torch.cat([angle, angle], -1)
    column = torch.arange(tokens)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    for b in range(batch):
        start, stop = padding[b % len(padding)]
        valid[b] = (column < start) | (column >= stop)
    run = Tokens(
        torch.randn(batch, KV_HEADS, tokens, DIM, **draw),
        torch.randn(batch, KV_HEADS, tokens, VALUE_DIM, **draw),
        angle.cos(),
        angle.sin(),
        (torch.rand(batch, KV_HEADS, tokens, **draw) < merge_rate).double(),
        torch.rand(batch, KV_HEADS, tokens, **draw) * 0.9 + 0.1,
        valid,
    )
    if options.get("size_weight") is not None:
        run = replace(run, size=torch.ones_like(run.omega))
    return Text(torch.randn(batch, HEADS, tokens, DIM, **draw), run, **options)


def turned(text: Text, x: Tensor, b: int, i: int) -> Tensor:
    """(D,) at position i: pairs (c, c + ROTARY / 2) turn, then come the factors."""
    half, out = ROTARY // 2, x.clone()
    cos, sin = text.tokens.cos[b, i], text.tokens.sin[b, i]
    for c in range(half):
        out[c] = x[c] * cos[c] - x[c + half] * sin[c]
        out[c + half] = x[c + half] * cos[c + half] + x[c] * sin[c + half]
    return out if text.factors is None else out * text.factors


def all_turned(text: Text, x: Tensor) -> Tensor:
    """(B, H, T, D), each at its position."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(x.shape[2]):
                out[b, h, i] = turned(text, x[b, h, i], b, i)
    return out


def entry(text: Text, b: int, k: int, members: list[int]) -> tuple[Tensor, Tensor]:
    """Rotated mean key and mean value of the tokens `members`."""
    weights = text.tokens.omega[b, k, members]
    share = (weights / weights.sum())[:, None]
    key = (text.tokens.key[b, k, members] * share).sum(0)
    return turned(text, key, b, members[-1]), (text.tokens.value[b, k, members] * share).sum(0)


def bias(text: Text, k: int, members: list[int]) -> float:
    """What is added to the score of the entry of the tokens `members`."""
    return 0.0 if text.size_weight is None else float(text.size_weight[k]) * math.log(len(members))


def groups(text: Text, b: int, k: int, i: int) -> tuple[list[list[int]], list[int] | None]:
    """Members of the closed entries and of the open one, once token i - delay is folded."""
    closed: list[list[int]] = []
    last: list[int] | None = None
    for j in range(i - text.delay + 1):
        is_valid = bool(text.tokens.valid[b, j])
        if last is not None and is_valid and text.tokens.alpha[b, k, j] == 1:
            last.append(j)
            continue
        if last is not None:
            closed.append(last)
        last = [j] if is_valid else None
    return closed, last


def expected(text: Text, b: int, h: int, i: int) -> Tensor:
    """(Dv,) what query i of head h gets."""
    k = h // (HEADS // KV_HEADS)
    closed, last = groups(text, b, k, i)
    exact = [j for j in range(max(i - text.delay + 1, 0), i + 1) if text.tokens.valid[b, j]]
    entries = [*closed, *([last] if last else [])]
    rows = [entry(text, b, k, some) for some in [*entries, *([j] for j in exact)]]
    extra = [*(bias(text, k, some) for some in entries), *(0.0 for _ in exact)]
    query = turned(text, text.query[b, h, i], b, i)
    scores = torch.stack([key for key, _ in rows]) @ query * SCALING
    if text.softcap is not None:
        scores = text.softcap * torch.tanh(scores / text.softcap)
    scores = scores + torch.tensor(extra, dtype=scores.dtype)
    return torch.softmax(scores, 0) @ torch.stack([value for _, value in rows])


def empty_pages(text: Text, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pages full of NaN and a table with room for every token, in no order; some are nobody's."""
    batch, tokens = text.shape
    columns = -(-tokens // text.page_size)
    count = batch * KV_HEADS * columns
    order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(seed))[:count]
    pages = torch.full((count + 2, text.page_size * (text.entry_dim + VALUE_DIM)), math.nan)
    return pages.double(), order.int().view(batch, KV_HEADS, columns)


def paged_call(text: Text, queries: int) -> PagedCall:
    """The last `queries` tokens ask."""
    batch, tokens = text.shape
    pages, table = empty_pages(text)
    keys, values = (view(pages, text.page_size, text.entry_dim) for view in (key_view, value_view))
    first = tokens - queries
    visible = torch.zeros(batch, KV_HEADS, queries, dtype=torch.int64)
    open_key = torch.zeros(batch, KV_HEADS, queries, DIM, dtype=torch.float64)
    open_value = torch.zeros(batch, KV_HEADS, queries, VALUE_DIM, dtype=torch.float64)
    open_bias = torch.zeros(batch, KV_HEADS, queries, dtype=torch.float64)
    open_valid = torch.zeros(batch, queries, dtype=torch.bool)
    for b in range(batch):
        for k in range(KV_HEADS):
            for q in range(queries):
                closed, last = groups(text, b, k, first + q)
                visible[b, k, q], open_valid[b, q] = len(closed), last is not None
                if last is not None:
                    open_key[b, k, q], open_value[b, k, q] = entry(text, b, k, last)
                    open_bias[b, k, q] = bias(text, k, last)
            for slot, members in enumerate(closed):
                page, row = table[b, k, slot // text.page_size], slot % text.page_size
                keys[page, :DIM, row], values[page, row] = entry(text, b, k, members)
                keys[page, DIM:, row] = bias(text, k, members)
    # Columns that no head needs are left out, those that a head does not need are -1.
    held = -(-visible[..., -1] // text.page_size)
    table[torch.arange(table.shape[2]) >= held[..., None]] = -1
    start = max(first - max(text.delay - 1, 0), 0)
    return PagedCall(
        query=all_turned(text, text.query)[:, :, first:], pages=pages, page_size=text.page_size,
        table=table[..., : int(held.max())], visible=visible, open_key=open_key,
        open_value=open_value, open_valid=open_valid,
        open_bias=None if text.size_weight is None else open_bias,
        exact_key=all_turned(text, text.tokens.key)[:, :, start:],
        exact_value=text.tokens.value[:, :, start:], exact_valid=text.tokens.valid[:, start:],
        delay=text.delay, scaling=SCALING, softcap=text.softcap,
    )  # fmt: skip


def first_step(text: Text) -> StepCall:
    """The call for the first token of a text, no token before it."""
    batch, _ = text.shape
    pages, table = empty_pages(text)

    def blank(count: int) -> Tokens:
        zeros = torch.zeros(batch, KV_HEADS, count, dtype=torch.float64)
        angle = torch.zeros(batch, count, ROTARY, dtype=torch.float64)
        return Tokens(
            zeros[..., None].repeat(1, 1, 1, DIM), zeros[..., None].repeat(1, 1, 1, VALUE_DIM),
            angle, angle.clone(), zeros, zeros + 1, torch.zeros(batch, count, dtype=torch.bool),
            None if text.size_weight is None else zeros + 1,
        )  # fmt: skip

    return StepCall(
        query=text.query[:, :, :1], new=text.tokens.narrow(0, 1), ring=blank(text.delay),
        turn=torch.zeros((), dtype=torch.int64), tail=blank(1), pages=pages,
        page_size=text.page_size, table=table,
        lengths=torch.zeros(batch, KV_HEADS, dtype=torch.int64), scaling=SCALING,
        softcap=text.softcap, factors=text.factors, size_weight=text.size_weight,
    )  # fmt: skip


def next_step(text: Text, call: StepCall, i: int) -> StepCall:
    """The call for token i, with the state that `call` left."""
    return replace(call, query=text.query[:, :, i : i + 1], new=text.tokens.narrow(i, i + 1))
