"""Random calls in the middle of a text, for the tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from cachefold.attention.call import PagedCall, StepCall
from cachefold.core.pages import key_view, value_view
from cachefold.core.tokens import Tokens


@dataclass(frozen=True)
class Case:
    batch: int = 2
    kv_heads: int = 2
    groups: int = 3
    dim: int = 64
    value_dim: int = 64
    rotary_dim: int = 64
    delay: int = 16
    page_size: int = 16
    columns: int = 3
    """Of the block table."""
    softcap: float | None = None
    factors: bool = False
    proportional: bool = False
    queries: int = 1

    @property
    def entry_dim(self) -> int:
        """Channels of a key in the pages."""
        return self.dim + self.proportional


class Draw:
    """Random tensors on the device."""

    def __init__(self, seed, device):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def below(self, high, *shape):
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def chance(self, share, *shape):
        return (torch.rand(*shape, generator=self.generator) < share).to(self.device)

    def tokens(self, case, count, dtype, mean_dtype=None):
        batch, heads = case.batch, case.kv_heads
        angle = self.normal(batch, count, case.rotary_dim)
        return Tokens(
            key=self.normal(batch, heads, count, case.dim, dtype=mean_dtype or dtype),
            value=self.normal(batch, heads, count, case.value_dim, dtype=mean_dtype or dtype),
            cos=angle.cos().to(dtype),
            sin=angle.sin().to(dtype),
            alpha=self.chance(0.5, batch, heads, count).float(),
            omega=self.normal(batch, heads, count).sigmoid() + 0.1,
            valid=self.chance(0.8, batch, count),
            size=self.below(9, batch, heads, count).float() + 1 if case.proportional else None,
        )

    def pages(self, case, lengths, dtype):
        """Pages and table in no order; NaN in every slot that holds no entry."""
        heads, size = case.batch * case.kv_heads, case.page_size
        count, dim = heads * case.columns + 2, case.entry_dim
        pages = torch.full((count, size * (dim + case.value_dim)), torch.nan, dtype=dtype)
        order = torch.randperm(count, generator=self.generator)
        table = order[: heads * case.columns].view(heads, case.columns).int()
        key, value = key_view(pages, size, dim), value_view(pages, size, dim)
        for head, length in enumerate(lengths.flatten().tolist()):
            for slot in range(length):
                page = table[head, slot // size]
                key[page, :, slot % size] = self.normal(dim, dtype=dtype).cpu()
                value[page, slot % size] = self.normal(case.value_dim, dtype=dtype).cpu()
            # The next entry may need one page more, no other page is there.
            table[head, length // size + 1 :] = -1
        return pages.to(self.device), table.view(case.batch, case.kv_heads, case.columns).to(
            self.device
        )


def step_call(case, dtype, seed=0, device="cpu"):
    """A state in the middle of a text: ragged heads, one of them empty, one with its last slot."""
    draw = Draw(seed, device)
    capacity = case.columns * case.page_size
    lengths = draw.below(max(capacity, 1), case.batch, case.kv_heads)
    lengths.view(-1)[0], lengths.view(-1)[-1] = 0, max(capacity - 1, 0)
    tail = draw.tokens(case, 1, dtype, torch.float32)
    tail.valid[0] = case.columns > 0
    if not case.columns:
        tail.valid.zero_()
    pages, table = draw.pages(case, lengths, dtype)
    return StepCall(
        query=draw.normal(case.batch, case.kv_heads * case.groups, 1, case.dim, dtype=dtype),
        new=draw.tokens(case, 1, dtype),
        ring=draw.tokens(case, case.delay, dtype),
        turn=draw.below(max(case.delay, 1)),
        tail=tail,
        pages=pages,
        page_size=case.page_size,
        table=table,
        lengths=lengths,
        scaling=case.dim**-0.5,
        softcap=case.softcap,
        factors=draw.normal(case.dim, dtype=dtype) if case.factors else None,
        size_weight=draw.normal(case.kv_heads) if case.proportional else None,
    )


def paged_call(case, dtype, seed=0, device="cpu"):
    """New tokens after a cache: queries see more and more entries, some open entries miss."""
    draw = Draw(seed, device)
    batch, heads, queries = case.batch, case.kv_heads, case.queries
    capacity = case.columns * case.page_size
    visible = draw.below(capacity + 1, batch, heads, queries).sort(-1).values
    visible[0, 0] = 0
    pages, table = draw.pages(case, visible[..., -1], dtype)
    tokens = queries + draw.below(case.delay + 1).item()

    def normal(*shape):
        return draw.normal(batch, *shape, dtype=dtype)

    return PagedCall(
        query=normal(heads * case.groups, queries, case.dim),
        pages=pages,
        page_size=case.page_size,
        table=table,
        visible=visible,
        open_key=normal(heads, queries, case.dim),
        open_value=normal(heads, queries, case.value_dim),
        open_valid=draw.chance(0.7, batch, queries),
        open_bias=draw.normal(batch, heads, queries) if case.proportional else None,
        exact_key=normal(heads, tokens, case.dim),
        exact_value=normal(heads, tokens, case.value_dim),
        exact_valid=draw.chance(0.8, batch, tokens),
        delay=case.delay,
        scaling=case.dim**-0.5,
        softcap=case.softcap,
    )


def chunk_call(
    queries, *, seed=0, batch=1, kv_heads=2, groups=3, older=0, before=0, rate=0.5, delay=4,
    dim=6, value_dim=4, page_size=16, softcap=None, padding=0.2, proportional=False,
):  # fmt: skip
    """A chunk in float64: `rate` of the queries see one entry more than the query before.

    There are no pages and columns but those needed; `older` exact tokens come before the chunk.
    """
    draw = Draw(seed, "cpu")

    def normal(*shape):
        return torch.randn(*shape, generator=draw.generator, dtype=torch.float64)

    first = draw.below(before + 1, batch, kv_heads, 1)
    visible = first + draw.chance(rate, batch, kv_heads, queries).long().cumsum(-1)
    held = -(-visible[..., -1] // page_size)
    column = torch.arange(int(held.max()))
    table = torch.randperm(held.numel() * len(column) + 1, generator=draw.generator)[:-1].int()
    table = table.view(batch, kv_heads, len(column))
    entry_dim = dim + proportional
    pages = torch.full((table.numel() + 1, page_size * (entry_dim + value_dim)), torch.nan).double()
    for b in range(batch):
        for k in range(kv_heads):
            slot = torch.arange(int(visible[b, k, -1]))
            page, row = table[b, k, slot // page_size].long(), slot % page_size
            key_view(pages, page_size, entry_dim)[page, :, row] = normal(len(slot), entry_dim)
            value_view(pages, page_size, entry_dim)[page, row] = normal(len(slot), value_dim)
    table[column >= held[..., None]] = -1
    return PagedCall(
        query=normal(batch, kv_heads * groups, queries, dim), pages=pages, page_size=page_size,
        table=table, visible=visible, open_key=normal(batch, kv_heads, queries, dim),
        open_value=normal(batch, kv_heads, queries, value_dim),
        open_bias=normal(batch, kv_heads, queries) if proportional else None,
        open_valid=draw.chance(1 - padding, batch, queries),
        exact_key=normal(batch, kv_heads, queries + older, dim),
        exact_value=normal(batch, kv_heads, queries + older, value_dim),
        exact_valid=draw.chance(1 - padding, batch, queries + older),
        delay=delay, scaling=0.5, softcap=softcap,
    )  # fmt: skip


def seeing(call):
    """(B, K, Q) True where a query sees anything at all; elsewhere the output is free."""
    queries, tokens = call.query.shape[2], call.exact_valid.shape[1]
    device = call.exact_valid.device
    row = torch.arange(queries, device=device)[:, None] + tokens - queries
    column = torch.arange(tokens, device=device)
    near = (column <= row) & (column > row - call.delay) & call.exact_valid[:, None]
    return (call.open_valid | near.any(-1))[:, None] | (call.visible > 0)


def converted(call, dtype):
    """The same call in another dtype; integers and flags as they are, tensors copied."""

    def convert(value):
        if isinstance(value, Tokens):
            return value.map(lambda _, tensor: convert(tensor))
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    return replace(call, **{f.name: convert(getattr(call, f.name)) for f in fields(call)})


def wide(call):
    """The same call in float64."""
    return converted(call, torch.float64)


def state(call):
    """What a step changes in place, by name."""
    runs = {
        f"{run}.{name}": tensor
        for run in ("ring", "tail")
        for name, tensor in getattr(call, run).named().items()
    }
    return runs | {"turn": call.turn, "pages": call.pages, "lengths": call.lengths}
