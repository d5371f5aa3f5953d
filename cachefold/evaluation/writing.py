"""Rows put to a model as prompts to continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate

Row: TypeAlias = dict[str, Any]

BLOCK = 16
"""Rows written together: what is lost when a run stops, and what batches are made of."""


def written(
    rows: Sequence[Row],
    prompt: Callable[[Row], str],
    subject: Subject,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[tuple[Row, str]]:
    """Lets the model continue the prompt of every row.

    Args:
        rows: in order.
        prompt: makes the text of a row.
        subject: the model.
        max_new_tokens: most tokens of an answer.
        stop: strings that end an answer; they are not part of it.

    Yields:
        Each row with what was written.

    Raises:
        ValueError: a prompt with its answer is longer than the model can read, so a part would be
            cut away unseen.
    """
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        prompts = [prompt(row) for row in block]
        for row, text in zip(block, prompts, strict=True):
            tokens = len(subject.encode(text))
            if tokens + max_new_tokens > subject.max_length:
                raise ValueError(
                    f"row {row['id']} has {tokens} tokens and its answer up to {max_new_tokens}; "
                    f"the model reads at most {subject.max_length}. Choose a shorter task, or a "
                    f"model with a longer context"
                )
        texts = subject.generate(prompts, max_new_tokens=max_new_tokens, stop=stop)
        yield from zip(block, texts, strict=True)


def means(results: Sequence[Row], *metrics: str) -> dict[str, Estimate]:
    """Mean of each metric over all results.

    >>> means([{"acc": 1.0}, {"acc": 0.0}], "acc")["acc"].value
    0.5
    """
    return {metric: Estimate.of([row[metric] for row in results]) for metric in metrics}
