"""Retrieval: does a model still find what it read a long way back?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cachefold.evaluation.haystack import KINDS, Haystack, make_haystack
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate, read_rows
from cachefold.evaluation.writing import means, written

Row: TypeAlias = dict[str, Any]

LENGTHS = (512, 1024, 2048)
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """Haystacks of one kind, made by seed to fit the model's tokenizer.

    `accuracy` is whether all answers occur in what the model writes, over all lengths and for
    each (`accuracy@512`). `found` is the share of answers that occur, where there are several.

    >>> Retrieval(name="passkey", kind="passkey").at(4096).rows(1)
    [{'id': '4096/0', 'length': 4096, 'seed': 0, 'depth': 0.5}]
    """

    name: str
    """Of the task."""
    kind: str
    """One of `haystack.KINDS`."""
    lengths: tuple[int, ...] = LENGTHS
    """Tokens of the prompts, in turn."""
    count: int = 20
    """Prompts of each length where no limit is given; depths are spread evenly, however many."""
    max_new_tokens: int = 16
    """Tokens of an answer."""
    metric: str = "accuracy"
    higher_is_better: bool = True

    def at(self, length: int) -> Retrieval:
        """The same task at one prompt length in tokens."""
        return dataclasses.replace(self, name=f"{self.name}@{length}", lengths=(length,))

    def rows(self, limit: int | None) -> list[Row]:
        """What prompts to make; the lengths take turns.

        Args:
            limit: how many, also more than `count` for each length, since they are made;
                None = `count` for each.

        Raises:
            ValueError: a limit below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {limit}")
        rows = [
            {
                "id": f"{length}/{i}", "length": length, "seed": i,
                # Multiples of the golden ratio fill the range evenly at any count.
                "depth": None if self._spread else round((0.5 + i * _GOLDEN) % 1, 3),
            }
            for i in range(self.count if limit is None else -(-limit // len(self.lengths)))
            for length in self.lengths
        ]  # fmt: skip
        return rows[:limit]

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Makes each prompt with the subject's tokenizer and looks for its answers."""

        def stack(row: Row) -> Haystack:
            return make_haystack(
                self.kind, row["length"], depth=row["depth"] or 0.0, seed=row["seed"],
                count_tokens=lambda text: len(subject.encode(text)),
            )  # fmt: skip

        stacks = {row["id"]: stack(row) for row in rows}
        answers = written(
            rows, lambda row: stacks[row["id"]].prompt, subject, max_new_tokens=self.max_new_tokens
        )
        for row, text in answers:
            made = stacks[row["id"]]
            yield {
                "id": row["id"], **judge(text, made.answers), "length": row["length"],
                "depth": row["depth"], "tokens": made.tokens, "text": text,
            }  # fmt: skip

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Means over all results, then by length."""
        estimates = means(results, "accuracy", *(["found"] if self._spread else []))
        lengths = sorted({row["length"] for row in results})
        for length in lengths if len(lengths) > 1 else []:
            there = [row for row in results if row["length"] == length]
            estimates[f"accuracy@{length}"] = means(there, "accuracy")["accuracy"]
        return estimates

    @property
    def _spread(self) -> bool:
        """Whether there are several answers, over the whole text."""
        return self.kind == "variable_tracking"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongEvalLines:
    """LongEval line retrieval: the number of one of 200 or 300 lines (Li et al. 2023).

    The prompt goes on with the beginning of the answer, since models that are not tuned for
    conversations would else write anything.
    """

    name: str = "longeval_lines"
    metric: str = "accuracy"
    higher_is_better: bool = True

    def rows(self, limit: int | None) -> list[Row]:
        """Rows of the data file; see `Task`."""
        return read_rows("eval/longeval_lines.jsonl.gz", ("query", "answer"), limit)

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Looks for the number in what follows the question."""
        for row, text in written(rows, _with_beginning, subject, max_new_tokens=16):
            found = judge(text, [str(row["answer"])])
            yield {"id": row["id"], "accuracy": found["accuracy"], "text": text}

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Mean over rows."""
        return means(results, "accuracy")


def _with_beginning(row: Row) -> str:
    asked = re.search(r"in line (\S+)\?", row["query"])
    if asked is None:
        raise ValueError(f"row {row['id']}: the query asks for no line")
    return f"{row['query']}\nThe <REGISTER_CONTENT> in line {asked[1]} is"


def judge(text: str, answers: Sequence[str]) -> dict[str, float]:
    """Whether answers occur in a text, as words of their own.

    Returns:
        `accuracy`: 1 when all occur; `found`: share of those that occur.

    >>> judge(" AB and CD.", ["AB", "CD"]), judge("12345", ["1234"])
    ({'accuracy': 1.0, 'found': 1.0}, {'accuracy': 0.0, 'found': 0.0})
    """
    found = [bool(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text)) for one in answers]
    return {"accuracy": float(all(found)), "found": sum(found) / len(found)}


TASKS = (
    *(
        Retrieval(name=kind, kind=kind, max_new_tokens=40 if kind == "variable_tracking" else 16)
        for kind in KINDS
    ),
    LongEvalLines(),
)
