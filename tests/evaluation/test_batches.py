"""Batches: sorted, bounded, smaller when memory runs out."""

from __future__ import annotations

import doctest

import pytest
import torch

from cachefold.evaluation import batches as module
from cachefold.evaluation.batches import Batcher


def record(batches):
    def work(rows):
        batches.append(rows)
        return [-row for row in rows]

    return work


def test_doctests_run():
    assert doctest.testmod(module).failed == 0


def test_the_longest_come_first_and_results_keep_their_order():
    batches: list[list[int]] = []
    found = Batcher(2).run([3, 9, 5, 7], 100, record(batches))
    assert batches == [[1, 3], [2, 0]] and found == [0, -1, -2, -3]


def test_texts_of_a_batch_differ_by_less_than_the_spread():
    batches: list[list[int]] = []
    Batcher(4).run([5, 5, 4, 9], 1, record(batches))
    assert batches == [[3], [0, 1], [2]]


def test_a_cpu_takes_a_bounded_number_of_tokens():
    batches: list[list[int]] = []
    Batcher("auto").run([1024] * 9 + [8192] + [4] * 80, 10**6, record(batches))
    sizes = [len(rows) for rows in batches]
    assert sizes[:4] == [1, 4, 4, 4] and max(sizes) == 32 and sum(sizes) == 90


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory: 9")]
)
def test_a_memory_error_halves_the_batch_for_good(error):
    tried = []

    def work(rows):
        tried.append(len(rows))
        if len(rows) > 3:
            raise error
        return rows

    assert Batcher("auto").run([10] * 16, 9, work) == list(range(16))
    assert tried == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_what_smaller_batches_do_not_help_is_raised_with_advice():
    def fail(error):
        def work(rows):
            raise error

        return work

    with pytest.raises(MemoryError) as caught:
        Batcher("auto").run([10], 9, fail(MemoryError()))
    assert "shorter text" in caught.value.__notes__[0]
    with pytest.raises(MemoryError) as caught:
        Batcher(2).run([10, 10], 9, fail(MemoryError()))
    assert '"auto"' in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="shapes"):
        Batcher("auto").run([10, 10], 9, fail(RuntimeError("shapes")))
