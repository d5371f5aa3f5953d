"""The check before any figure: a backend that computes something else has no speed.

Legend: B batch, H query heads, T tokens, Dv value dim.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cachefold.attention import reference
from cachefold.attention.call import PagedCall, StepCall, entry_key_dim
from cachefold.attention.dispatch import Backend, choose
from cachefold.benchmark.synthetic import Case, Shape, chunk_call, paged_call, step_call
from cachefold.core.pages import gather
from cachefold.core.tokens import Tokens

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest relative error of a head's output. One page left out of 40,000 entries is seen."""
STEPS = 3
"""Steps that are compared one after the other, so that what a step wrote is read again."""

CHUNK = 40
"""Tokens of the chunk of a prefill that is compared."""


class Backends(NamedTuple):
    """Names of the backends that were checked."""

    decode: str
    prefill: str


class ParityError(RuntimeError):
    """A backend differs from the reference; no figure may be shown."""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest error of a vector (last dim) in units of its length; inf when there is a NaN.

    >>> relative_error(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0], [0, 1]]))
    1.0
    """
    difference = (got.double() - wanted.double()).norm(dim=-1)
    error = (difference / wanted.double().norm(dim=-1).clamp(min=1e-9)).max()
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def check_backend(
    shape: Shape, wanted: str, dtype: torch.dtype, device: torch.device, asked: Case
) -> Backends:
    """Compares a backend with the reference: a small case whole, the last row of the asked one.

    Args:
        shape: of a layer.
        wanted: `auto` or the name of a backend.
        dtype: of the entries.
        device: to run on; the reference gets the same numbers in float32.
        asked: the case that is to be timed.

    Returns:
        The backends that the calls went to.

    Raises:
        ParityError: they differ.
        ValueError: no such backend, or it can't do it here.

    >>> case = Case(1, 64, 2.0)
    >>> check_backend(Shape(), "reference", torch.float32, torch.device("cpu"), case)
    Backends(decode='reference', prefill='reference')
    """
    small = max(3 * (shape.delay + 2), 4 * shape.page_size)
    for case in (Case(2, small, 1.5, asked.seed), asked):
        call = step_call(shape, case, dtype, device, steps=STEPS, shuffled=True)
        place = f"{case}, {str(dtype).removeprefix('torch.')}"
        backend = choose(call, wanted)
        row = case.batch - 1
        prefill = _check_attend(wanted, call, row, place)
        _check_steps(backend, call, row, place)
    return Backends(backend.name, prefill.name)


def _check_attend(wanted: str, call: StepCall, row: int, place: str) -> Backend:
    """Returns the backend of the prefill."""
    for name, paged in (("attention", paged_call(call)), ("prefill", chunk_call(call, CHUNK, 1))):
        backend = choose(paged, wanted)
        got, exact = backend.attend(paged), reference.attend(_copied_paged(paged, row))
        _compare(got[row], exact[0], call.pages.dtype, f"{place}: backend {backend.name}, {name}")
    return backend


def _check_steps(backend: Backend, call: StepCall, row: int, case: str) -> None:
    exact, dtype = _copied(call, row), call.pages.dtype
    for step in range(STEPS):
        got, wanted = backend.step(call), reference.step(exact)
        place = f"{case}: backend {backend.name}, step {step + 1}"
        _compare(got[row], wanted[0], dtype, f"{place}, output")
        if call.lengths[row].tolist() != exact.lengths[0].tolist() or call.turn != exact.turn:
            raise ParityError(f"{place}: it closes other entries than the reference")
        for name, (ours, theirs) in _written(call, exact, row).items():
            _compare(ours, theirs, dtype, f"{place}, {name}")


def _written(call: StepCall, exact: StepCall, row: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What a step leaves behind, that of the backend and that of the reference."""
    dim, tail = entry_key_dim(call), "open entry, "
    columns = int(call.lengths[row].max() - 1) // call.page_size + 1
    exists = torch.arange(columns * call.page_size, device=call.lengths.device)
    exists = exists < call.lengths[row, :, None]
    ours, theirs = (
        gather(one.pages, one.page_size, dim, one.table[at, None, :, :columns])
        for one, at in ((call, row), (exact, 0))
    )
    found = {
        "entry keys": (ours[0][0][exists], theirs[0][0][exists]),
        "entry values": (ours[1][0][exists], theirs[1][0][exists]),
        tail + "weight": (call.tail.omega[row], exact.tail.omega[0]),
    }
    if call.tail.size is not None and exact.tail.size is not None:
        found[tail + "size"] = call.tail.size[row], exact.tail.size[0]
    for name in ("key", "value"):
        found[tail + name] = getattr(call.tail, name)[row], getattr(exact.tail, name)[0]
        found["ring " + name] = getattr(call.ring, name)[row], getattr(exact.ring, name)[0]
    return found


def _compare(got: Tensor, wanted: Tensor, dtype: torch.dtype, place: str) -> None:
    error = relative_error(got, wanted)
    if error > TOLERANCE[dtype]:
        raise ParityError(
            f"{place}: relative error {error:.2g} to the reference, {TOLERANCE[dtype]:g} is "
            "allowed. No figures are shown; choose another --backend, and report this with the "
            "output of `cachefold env`"
        )


def _copied(call: StepCall, row: int) -> StepCall:
    """The state of one request in float32, apart from the original."""

    def one(tokens: Tokens) -> Tokens:
        return tokens.map(lambda _, tensor: wide(tensor[row, None]))

    return replace(
        call, query=wide(call.query[row, None]), new=one(call.new), ring=one(call.ring),
        tail=one(call.tail), table=call.table[row, None], lengths=wide(call.lengths[row, None]),
        pages=wide(call.pages), turn=call.turn.clone(),
    )  # fmt: skip


def _copied_paged(call: PagedCall, row: int) -> PagedCall:
    """One request of a call in float32."""
    whole: dict[str, Any] = {
        f.name: wide(value[row, None])
        for f in fields(PagedCall)
        if isinstance(value := getattr(call, f.name), Tensor) and f.name != "pages"
    }
    return replace(call, pages=wide(call.pages), **whole)


def wide(tensor: Tensor) -> Tensor:
    """A copy, in float32 where it has a point.

    >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    tensor = tensor.clone()
    return tensor.float() if tensor.is_floating_point() else tensor


def check_logits(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    """Compares the logits of a whole model, whose layers add up what rounding does.

    Args:
        got: (B, T, vocab).
        wanted: (B, T, vocab).
        dtype: of the weights.
        what: for the message.

    Raises:
        ParityError: they differ.

    >>> check_logits(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.float32, "backend x")
    """
    allowed: Any = {torch.float32: 1e-3}.get(dtype, 0.1)
    error = relative_error(got, wanted)
    if error > allowed:
        raise ParityError(
            f"{what}: logits differ by {error:.2g}, {allowed:g} is allowed. No figures are shown; "
            "choose another --backend, and report this with the output of `cachefold env`"
        )
