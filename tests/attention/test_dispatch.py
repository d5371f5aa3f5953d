"""The choice of a backend, what is said about it, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import replace

import pytest
import torch

from cachefold.attention import dispatch, reference
from tests.attention import lists


class Fake(reference.PlainTorch):
    """A backend that a test sends away."""

    def __init__(self, name: str, reason: str = "", asked: list[str] | None = None) -> None:
        self.name, self.reason = name, reason
        self.asked = [] if asked is None else asked

    def supports(self, call) -> tuple[bool, str]:
        self.asked.append(self.name)
        return not self.reason, self.reason


@pytest.fixture(autouse=True)
def forget():
    """What was said is said again."""
    for memo in (
        dispatch.load_backend,
        dispatch.tell,
        dispatch._tell_choice,
        dispatch._tell_refusal,
    ):
        memo.cache_clear()


def calls():
    text = lists.make_text(0, 1, 9, 0.5, [(0, 0)], delay=2, page_size=16)
    return lists.paged_call(text, 3), lists.first_step(text)


def install(monkeypatch, **backends) -> None:
    """Names that are left out are not there."""
    monkeypatch.setattr(
        dispatch,
        "load_backend",
        lambda name: (backends.get(name), "" if name in backends else "gone"),
    )


def test_the_first_that_can_is_taken_and_all_is_said_once(monkeypatch, caplog):
    install(monkeypatch, numba=Fake("numba", "odd shape"), torch=Fake("torch"), reference=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with caplog.at_level(logging.INFO):
        for call in calls() * 3:
            assert dispatch.choose(call).name == "torch"
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("INFO", "backend numba is not used: odd shape"),
        ("INFO", "backend triton is not used: gone"),
        ("INFO", "prefill: backend torch"),
        ("INFO", "decoding: backend torch"),
    ]


def test_a_missing_package_is_a_warning_where_it_would_help(monkeypatch, caplog):
    install(monkeypatch, reference=reference.BACKEND)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch.choose(calls()[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "numba is not used: gone; it would be faster" in caplog.text
    assert "pip install numba" in caplog.text


def test_a_wanted_backend_that_cannot_says_why(monkeypatch):
    fake = Fake("torch", "heads of 7 channels")
    install(monkeypatch, torch=fake, reference=reference.BACKEND)
    paged, step = calls()
    with pytest.raises(ValueError, match="'torch' can't compute prefill here: heads of 7.*ls back"):
        dispatch.choose(paged, "torch")
    with pytest.raises(ValueError, match="'triton' can't compute decoding here: gone"):
        dispatch.choose(step, "triton")
    with pytest.raises(ValueError, match="unknown backend 'tritom'. Did you mean 'triton'"):
        dispatch.choose(step, "tritom")
    assert dispatch.choose(step, "reference") is reference.BACKEND


def test_a_cache_in_training_goes_to_the_reference(monkeypatch):
    asked: list[str] = []
    install(monkeypatch, torch=Fake("torch", asked=asked), reference=reference.BACKEND)
    paged = calls()[0]
    paged = replace(paged, exact_value=paged.exact_value.requires_grad_())
    assert dispatch.choose(paged).name == "reference" and not asked
    with pytest.raises(ValueError, match="no_grad"):
        dispatch.choose(paged, "torch")
    with torch.no_grad():
        assert dispatch.choose(paged).name == "torch"


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(dispatch._MODULES, "triton", "no_such_module")
    ok, reason = dispatch.list_backends()["triton"]
    assert not ok and "no_such_module" in reason


def test_every_backend_has_a_module():
    for name in dispatch.ORDER:
        module = importlib.import_module(f"cachefold.attention.{dispatch._MODULES[name]}")
        assert module.BACKEND.name == name
    assert list(dispatch.list_backends()) == list(dispatch.ORDER)
