"""The order in which variants run, and which of them stay in the race."""

from __future__ import annotations

import gc

import pytest

from cachefold.benchmark.timing import Times, contenders, interleave


def test_rounds_rotate_and_what_goes_before_is_not_timed():
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(variants, 4, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-c" + "-b-c-a" + "-c-a-b" + "-a-b-c"
    assert {name: len(one.ms) for name, one in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_garbage_collection_comes_back_after_a_failure():
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({"a": fail}, 1)
    assert gc.isenabled()


def test_quartiles():
    assert (Times([5.0]).low, Times([5.0]).median, Times([5.0]).high) == (5.0, 5.0, 5.0)
    times = Times([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (times.low, times.median, times.high) == (2.0, 3.0, 4.0)


def test_contenders_of_one_group():
    warm = {"dense a": 10.0, "dense b": 19.0, "dense c": 21.0, "folded a": 100.0}
    assert contenders(warm, "dense ") == {"dense a", "dense b"}
    assert contenders(warm, "dense ", slower=1.5) == {"dense a"}
    assert contenders(warm, "folded ") == {"folded a"}
    assert contenders(warm, "nothing ") == set()
