"""Attention calls with an imposed compression ratio: random entries, ragged over the heads.

Speed depends on how many entries a head holds and not on what is in them, so that it can be
measured apart from training. Whatever comes from here is to be reported as imposed.

Legend: B batch, H query heads, K kv heads, T tokens seen, N exact tokens, D key dim, Dv value dim,
R rotary dim, C columns of the block table, P pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachefold.attention.call import PagedCall, StepCall, entries_have_bias, open_bias
from cachefold.benchmark.config import DELAY
from cachefold.core.rotary import rotate
from cachefold.core.tokens import Tokens

SPREAD = 0.5
"""How far the closed entries of a head may be from the mean: 0.5 = half of it to 1.5 times it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What an attention layer looks like; the defaults are SmolLM2-135M.

    >>> Shape().heads // Shape().kv_heads
    3
    """

    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    delay: int = DELAY
    page_size: int = 16
    rope_theta: float = 100_000.0
    proportional: bool = False
    """Entries have a bias, one more channel of their keys."""

    @classmethod
    def of(cls, config: Any, delay: int = DELAY, *, proportional: bool = False) -> Shape:
        """The shape of a model, from its transformers config."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            delay=delay,
            proportional=proportional,
        )


@dataclass(frozen=True, slots=True)
class Case:
    """What a layer has seen: B requests of T tokens at an imposed ratio.

    >>> Case(8, 8192, 4.0)
    8 x 8192, cr 4
    """

    batch: int
    tokens: int
    cr: float
    seed: int = 0
    """Of everything random."""

    def __repr__(self) -> str:
        return f"{self.batch} x {self.tokens}, cr {self.cr:g}"


def ragged_lengths(
    batch: int, kv_heads: int, tokens: int, cr: float, delay: int, generator: torch.Generator
) -> Tensor:
    """Closed entries of every head, so that all heads together keep tokens / cr each.

    Args:
        batch: B.
        kv_heads: K.
        tokens: T.
        cr: tokens seen / entries kept; the ring of `delay` and the open entry are kept too.
        delay: tokens that stay exact.
        generator: of the spread over the heads.

    Returns:
        (B, K) int64; with cr 1 all heads hold T - delay - 1.

    >>> lengths = ragged_lengths(2, 3, 512, 4.0, 16, torch.Generator().manual_seed(0))
    >>> (lengths + 17).sum().item() == 2 * 3 * 512 // 4, lengths.unique().numel() > 1
    (True, True)
    """
    most = tokens - delay - 1
    mean = tokens / cr - delay - 1
    noise = torch.rand(batch * kv_heads, generator=generator, dtype=torch.float64)
    noise = noise - noise.mean()
    noise = noise / noise.abs().max().clamp(min=1e-9)
    spread = min(SPREAD, (most - mean) / mean)
    exact = mean * (1 + spread * noise)
    lengths = exact.floor()
    # What rounding took goes to the heads it took most from.
    missing = round(batch * kv_heads * mean) - int(lengths.sum())
    lengths[(exact - lengths).argsort(descending=True)[:missing]] += 1
    return lengths.long().view(batch, kv_heads)


def merges(
    lengths: Tensor, tokens: int, more: int, cr: float, delay: int, generator: torch.Generator
) -> Tensor:
    """Decisions that leave `lengths` closed entries after so many tokens.

    Args:
        lengths: (B, K) closed entries.
        tokens: T, of a prefill.
        more: tokens that follow; they merge with probability 1 - 1 / cr, as the ring does.
        cr: tokens seen / entries kept.
        delay: tokens that stay exact.
        generator: of the choice.

    Returns:
        (B, K, T + more) bool, True = merge.

    >>> generator = torch.Generator().manual_seed(0)
    >>> found = merges(torch.tensor([[5]]), 40, 3, 4.0, 8, generator)
    >>> found.shape, (~found[..., :32]).sum().item()  # the first opens, five others close
    (torch.Size([1, 1, 43]), 6)
    """
    folded = tokens - delay
    order = torch.rand(*lengths.shape, folded, generator=generator)
    order[..., 0] = -1.0
    rank = order.argsort(-1).argsort(-1)
    rest = torch.rand(*lengths.shape, delay + more, generator=generator)
    return torch.cat([rank > lengths[..., None], rest < 1 - 1 / cr], -1)


def step_call(
    shape: Shape, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu",
    *, steps: int = 1, shuffled: bool = False,
) -> StepCall:  # fmt: skip
    """The decode call of one layer.

    Args:
        shape: of the layer.
        case: what the layer has seen.
        dtype: of query and entries.
        device: of all tensors.
        steps: how often the call may be carried out; the table has pages for that.
        shuffled: pages of a head lie anywhere instead of in a row, as a prefill leaves them.

    >>> call = step_call(Shape(), Case(2, 128, 2.0), torch.float32)
    >>> call.query.shape, call.table.shape[:2], (call.lengths + 17).sum().item()
    (torch.Size([2, 9, 1, 64]), torch.Size([2, 3]), 384)
    """
    generator = torch.Generator().manual_seed(case.seed)
    batch, tokens, cr = case.batch, case.tokens, case.cr
    lengths = ragged_lengths(batch, shape.kv_heads, tokens, cr, shape.delay, generator)
    table, count = _table(lengths + steps, shape.page_size, generator if shuffled else None)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    def run(first: int, num_tokens: int) -> Tokens:
        heads = (batch, shape.kv_heads, num_tokens)
        cos, sin = rotary(shape, first, num_tokens)
        return Tokens(
            draw(*heads, shape.head_dim), draw(*heads, shape.head_dim),
            cos.expand(batch, -1, -1).to(device, dtype).contiguous(),
            sin.expand(batch, -1, -1).to(device, dtype).contiguous(),
            (torch.rand(heads, generator=generator) < 1 - 1 / cr).float().to(device),
            (torch.rand(heads, generator=generator) + 0.1).to(device),
            torch.ones(batch, num_tokens, dtype=torch.bool, device=device),
            torch.ones(heads, device=device) if shape.proportional else None,
        )  # fmt: skip

    ring = run(tokens - shape.delay, shape.delay)
    tail, new = run(tokens - shape.delay - 1, 1), run(tokens, 1)
    tail = Tokens(tail.key.float(), tail.value.float(), *tail.tensors()[2:])
    return StepCall(
        query=draw(batch, shape.heads, 1, shape.head_dim), new=new, ring=ring,
        turn=torch.zeros((), dtype=torch.int64, device=device), tail=tail,
        pages=draw(count, shape.page_size * (2 * shape.head_dim + shape.proportional)),
        page_size=shape.page_size, table=table.to(device), lengths=lengths.to(device),
        scaling=shape.head_dim**-0.5,
        size_weight=torch.ones(shape.kv_heads, device=device) if shape.proportional else None,
    )  # fmt: skip


def _table(lengths: Tensor, page_size: int, shuffle: torch.Generator | None) -> tuple[Tensor, int]:
    """(B, K, C) int32 with pages for `lengths` (B, K) entries, and how many pages that is."""
    pages = (lengths + page_size - 1) // page_size
    count = int(pages.sum())
    column = torch.arange(int(pages.max()))
    table = torch.full((*lengths.shape, len(column)), -1, dtype=torch.int32)
    order = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
    table[column < pages[..., None]] = order.int()
    return table, count


def rotary(shape: Shape, first: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (1, N, D) float32 each, of the positions from `first`.

    >>> rotary(Shape(), 0, 2)[0][0, 0, 0].item()
    1.0
    """
    half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
    angle = torch.arange(first, first + num_tokens)[:, None] / shape.rope_theta**half
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def paged_call(call: StepCall) -> PagedCall:
    """What a decode call attends to, as a call for attention alone: nothing is folded.

    >>> step = step_call(Shape(), Case(1, 64, 2.0), torch.float32)
    >>> paged_call(step).visible.shape
    torch.Size([1, 3, 1])
    """
    ring, tail, dtype = call.ring, call.tail, call.query.dtype
    return PagedCall(
        query=rotate(call.query, call.new.cos, call.new.sin), pages=call.pages,
        page_size=call.page_size, table=call.table, visible=call.lengths[..., None].clone(),
        open_key=rotate(tail.key.to(dtype), tail.cos, tail.sin), open_value=tail.value.to(dtype),
        open_bias=open_bias(call), open_valid=tail.valid.clone(),
        exact_key=rotate(ring.key, ring.cos, ring.sin), exact_value=ring.value.clone(),
        exact_valid=ring.valid.clone(),
        delay=ring.valid.shape[1], scaling=call.scaling, softcap=call.softcap,
    )  # fmt: skip


def chunk_call(call: StepCall, queries: int, seed: int) -> PagedCall:
    """A chunk of a prefill over the entries of a decode call; open and exact tokens are random.

    The last query sees all closed entries, every second one before it one less; the first three
    of request 0 have no open entry.

    Args:
        call: whose entries are seen.
        queries: Q.
        seed: of all the rest.

    >>> step = step_call(Shape(), Case(1, 64, 2.0), torch.float32)
    >>> chunk_call(step, 4, seed=0).visible[0, 0].tolist(), step.lengths[0, 0].item()
    ([21, 21, 22, 22], 22)
    """
    batch, kv_heads = call.lengths.shape
    heads, delay, dim = call.query.shape[1], call.ring.valid.shape[1], call.query.shape[-1]
    generator = torch.Generator().manual_seed(seed)

    def draw(some_heads: int, tokens: int) -> Tensor:
        values = torch.randn(batch, some_heads, tokens, dim, generator=generator)
        return values.to(call.query.device, call.query.dtype)

    exact = queries + max(delay - 1, 0)
    missing = torch.arange(queries - 1, -1, -1, device=call.lengths.device) // 2
    open_valid = torch.ones(batch, queries, dtype=torch.bool, device=call.query.device)
    open_valid[0, :3] = False
    return PagedCall(
        query=draw(heads, queries), pages=call.pages, page_size=call.page_size, table=call.table,
        visible=(call.lengths[..., None] - missing).clamp(min=0),
        open_key=draw(kv_heads, queries), open_value=draw(kv_heads, queries),
        open_bias=draw(kv_heads, queries)[..., 0].float() if entries_have_bias(call) else None,
        open_valid=open_valid, exact_key=draw(kv_heads, exact), exact_value=draw(kv_heads, exact),
        exact_valid=torch.ones(batch, exact, dtype=torch.bool, device=call.query.device),
        delay=delay, scaling=call.scaling, softcap=call.softcap,
    )  # fmt: skip


def moved_nbytes(call: StepCall) -> int:
    """Bytes that a decode call can't help moving: its entries, ring, open entry, query, output.

    >>> moved_nbytes(step_call(Shape(), Case(1, 512, 1.0), torch.bfloat16))
    396288
    """
    item = call.pages.element_size()
    width = call.pages.shape[1] // call.page_size
    entries = int(call.lengths.sum()) + call.ring.omega.numel()
    moved = entries * width * item + call.tail.omega.numel() * width * 4
    return moved + 2 * call.query.numel() * call.query.element_size()
