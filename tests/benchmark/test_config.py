"""Options of a run, and the documented examples."""

from __future__ import annotations

import doctest
import importlib

import pytest

from cachefold.benchmark.config import DELAY, GRIDS, PARTS, BenchConfig, check_room, numbers
from cachefold.benchmark.synthetic import Shape
from cachefold.policies import DMC


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("atention",)}, "Did you mean 'attention'"),
        ({"parts": ()}, "nothing to measure"),
        ({"dtype": ("bf16",)}, "Did you mean 'bfloat16'"),
        ({"batch": (0,)}, "--batch takes whole numbers >= 1"),
        ({"context": (-5,)}, "--context takes whole numbers >= 1"),
        ({"cr": (0.5,)}, "at least 1"),
        ({"cr": (float("nan"),)}, "at least 1"),
        ({"repeats": 0}, "--repeats must be >= 1"),
        ({"steps": 0}, "--steps must be >= 1"),
        ({"threads": 0}, "--threads must be >= 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**{"parts": ("attention",), **options})


def test_grid_keeps_what_is_not_asked():
    config = BenchConfig(parts=PARTS, context=(2048,), cr=(4,))
    for part in PARTS:
        grid = config.grid(part)
        assert grid.context == (2048,) and grid.cr == (4.0,)
        assert grid.batch == GRIDS[part].batch and grid.repeats == GRIDS[part].repeats


@pytest.mark.parametrize("text", ["1;8", "", "one", "1.5"])
def test_numbers_refuses(text):
    with pytest.raises(ValueError, match="--batch takes whole numbers"):
        numbers("--batch", text, int)


def test_room_names_a_context_that_has_room():
    with pytest.raises(ValueError, match="at least 145 or a smaller --cr"):
        check_room([512, 128], [1.0, 8.0])
    check_room([145], [8.0])


def test_exact_tokens_are_those_of_the_usual_policy():
    assert DELAY == DMC().delay == Shape().delay


@pytest.mark.parametrize("part", PARTS)
def test_a_ratio_out_of_reach_is_refused_before_anything_is_loaded(part):
    options = {"parts": (part,), "context": (64,), "cr": (8.0,)}
    if part == "llama":  # keeps every token
        BenchConfig(**options)
        return
    with pytest.raises(ValueError, match="choose a context of at least 145"):
        BenchConfig(**options)


@pytest.mark.parametrize(
    "name",
    [
        "attention", "config", "imposed", "llama", "machine", "memory", "parity", "report",
        "synthetic", "timing",
    ],
)  # fmt: skip
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.benchmark.{name}"))
    assert result.attempted and not result.failed
