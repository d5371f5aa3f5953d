"""Options of a comparison."""

from __future__ import annotations

import pytest

from cachefold.evaluation.settings import EvalSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bflot16"}, "Did you mean 'bfloat16'"),
        ({"pieces": 0}, "--pieces must be >= 1"),
        ({"tokens": 1}, "--tokens must be >= 2"),
        ({"context": 1}, "--context must be >= 2"),
        ({"limit": 0}, "--limit must be >= 1"),
        ({"batch_size": 0}, "--batch-size must be >= 1"),
    ],
)
def test_what_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**changes)


def test_what_is_allowed() -> None:
    assert EvalSettings(limit=None, batch_size=4, pieces=1).tokens == 1024
