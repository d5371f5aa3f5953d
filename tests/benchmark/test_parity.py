"""The gate lets the reference through and stops every backend that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cachefold.attention import reference
from cachefold.benchmark import parity
from cachefold.benchmark.parity import ParityError, check_backend, check_logits, relative_error
from cachefold.benchmark.synthetic import Case, Shape
from cachefold.core.pages import key_view

SMALL = Shape(layers=2, heads=4, kv_heads=2, head_dim=16)
SIZED = replace(SMALL, proportional=True)
ASKED = Case(2, 700, 2.0)
CPU = torch.device("cpu")


class Wrong:
    """The reference with one mistake."""

    name = "wrong"

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def attend(self, call):
        if self.mistake == "last page unseen":
            visible = (call.visible - 1) // call.page_size * call.page_size
            return reference.attend(replace(call, visible=visible))
        if self.mistake == "prefill" and call.query.shape[2] > 1:
            return reference.attend(
                replace(call, visible=call.visible[..., -1:].expand_as(call.visible))
            )
        if self.mistake == "page order":
            return reference.attend(replace(call, table=call.table.flip(0)))
        out = reference.attend(call)
        return {"scale": out * 1.05, "nan": out * float("nan")}.get(self.mistake, out)

    def step(self, call):
        before = call.lengths.clone()
        out = reference.step(call)
        if self.mistake == "one head's output":
            out[:, -1] = out[:, 0]
        if self.mistake == "lengths":
            call.lengths.copy_(before)
        if self.mistake == "turn":
            call.turn.zero_()
        if self.mistake == "weight":
            call.tail.omega.mul_(1.1)
        if self.mistake == "size":
            call.tail.size.add_(1.0)
        if self.mistake == "ring":
            call.ring.value.copy_(call.ring.value.roll(1, 2))
        if self.mistake == "closed key":
            closed = (call.lengths > before).nonzero()
            for batch, head in closed.tolist():
                slot = int(call.lengths[batch, head]) - 1
                page = call.table[batch, head, slot // call.page_size]
                keys = key_view(call.pages, call.page_size, SMALL.head_dim)
                keys[page, :, slot % call.page_size].neg_()
        return out


@pytest.mark.parametrize("shape", [SMALL, SIZED], ids=["plain", "proportional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_passes(dtype, shape):
    assert check_backend(shape, "reference", dtype, CPU, ASKED) == ("reference",) * 2


@pytest.mark.parametrize(
    ("mistake", "place"),
    [
        ("last page unseen", "attention"),
        ("page order", "attention"),
        ("prefill", "prefill"),
        ("scale", "attention"),
        ("nan", "attention: relative error inf"),
        ("one head's output", "step 1, output"),
        ("lengths", "closes other entries"),
        ("turn", "closes other entries"),
        ("weight", "open entry, weight"),
        ("ring", "ring value"),
        ("closed key", "entry keys"),
    ],
)
def test_mistakes_are_found(monkeypatch, mistake, place):
    monkeypatch.setattr(parity, "choose", lambda call, wanted: Wrong(mistake))
    with pytest.raises(ParityError, match=f"backend wrong, .*{place}"):
        check_backend(SMALL, "wrong", torch.bfloat16, CPU, ASKED)


@pytest.mark.parametrize("mistake", ["size", "bias of the open entry"])
def test_mistakes_with_sizes_are_found(monkeypatch, mistake):
    class Unbiased(Wrong):
        def attend(self, call):
            if mistake != "size":
                call = replace(call, open_bias=torch.zeros_like(call.open_bias))
            return super().attend(call)

    monkeypatch.setattr(parity, "choose", lambda call, wanted: Unbiased(mistake))
    with pytest.raises(ParityError, match="open entry, size" if mistake == "size" else "prefill"):
        check_backend(SIZED, "wrong", torch.float32, CPU, ASKED)


def test_only_the_asked_case_is_wrong(monkeypatch):
    """A mistake that shows with many entries only."""

    class Short(Wrong):
        def attend(self, call):
            return reference.attend(replace(call, visible=call.visible.clamp(max=300)))

    monkeypatch.setattr(parity, "choose", lambda call, wanted: Short(""))
    with pytest.raises(ParityError, match="2 x 700, cr 2, float32"):
        check_backend(SMALL, "wrong", torch.float32, CPU, ASKED)
    check_backend(SMALL, "wrong", torch.float32, CPU, replace(ASKED, tokens=300))


def test_relative_error_of_nan_is_infinite():
    assert relative_error(torch.tensor([[float("nan")]]), torch.ones(1, 1)) == float("inf")


def test_logits():
    wanted = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    check_logits(wanted * 1.01, wanted, torch.bfloat16, "x")
    with pytest.raises(ParityError, match="x: logits differ"):
        check_logits(wanted * 1.01, wanted, torch.float32, "x")
    with pytest.raises(ParityError, match="x: logits differ"):
        check_logits(wanted.roll(1, 1), wanted, torch.bfloat16, "x")
