"""Multiple choice and the last word: tasks that compare the likelihood of continuations.

Prompts and metrics are those of lm-eval, so that figures can be compared with its own.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cachefold.evaluation.subject import Scored, Subject
from cachefold.evaluation.task import Estimate, read_rows

Row: TypeAlias = dict[str, Any]
Pairs: TypeAlias = list[tuple[str, str]]
"""(context, continuation) of every choice."""

BLOCK = 64
"""Rows scored together: what is lost when a run stops, and what batches are made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Questions with a few answers, of which the model finds one the likeliest.

    `acc` takes the answer with the highest logprob, `acc_norm` that with the highest logprob per
    character, as lm-eval does.
    """

    name: str
    """Of the task, and of its file."""
    pairs: Callable[[Row], Pairs]
    """Makes what is scored of a row."""
    metric: str = "acc"
    """Headline."""
    metrics: tuple[str, ...] = ("acc",)
    """All that are taken."""
    file: str = ""
    """Of the data folder's eval, where it isn't called like the task."""
    fields: tuple[str, ...] = ("query", "choices", "gold")
    """Every row has them."""
    by_subject: bool = False
    """Whether rows come from all subjects in turn."""
    higher_is_better: bool = True

    def rows(self, limit: int | None) -> list[Row]:
        """Rows of the data file; see `Task`."""
        name = f"eval/{self.file or self.name}.jsonl.gz"
        if not self.by_subject:
            return read_rows(name, self.fields, limit, _wrong)
        return _in_turn(read_rows(name, self.fields, wrong=_wrong))[:limit]

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Scores rows; results also say all logprobs in nats."""
        for block, scores in _scored_blocks(rows, self.pairs, subject):
            for row, scored in zip(block, scores, strict=True):
                yield self._judge(row, [one.logprob for one in scored])

    def _judge(self, row: Row, logprobs: list[float]) -> Row:
        per_character = [
            logprob / len(choice) for logprob, choice in zip(logprobs, row["choices"], strict=True)
        ]
        best = {"acc": logprobs, "acc_norm": per_character}
        right = {
            metric: float(best[metric].index(max(best[metric])) == row["gold"])
            for metric in self.metrics
        }
        return {"id": row["id"], **right, "logprobs": logprobs}

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Mean of every metric, the headline first."""
        order = sorted(self.metrics, key=lambda metric: metric != self.metric)
        return {metric: Estimate.of([row[metric] for row in results]) for metric in order}


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWord:
    """LAMBADA: the last word of a passage, by greedy match (`acc`) and its perplexity."""

    name: str = "lambada"
    metric: str = "acc"
    higher_is_better: bool = True

    def rows(self, limit: int | None) -> list[Row]:
        """Rows of the data file; see `Task`."""
        return read_rows("eval/lambada_openai.jsonl.gz", ("context", "target"), limit)

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Scores rows; `nats` is the loss of the whole word."""
        for block, scores in _scored_blocks(rows, _last_word, subject):
            for row, [scored] in zip(block, scores, strict=True):
                yield {"id": row["id"], "acc": float(scored.greedy), "nats": -scored.logprob}

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Means; the perplexity is that of words, its error by the delta method."""
        return {
            "acc": Estimate.of([row["acc"] for row in results]),
            "perplexity": Estimate.of([row["nats"] for row in results]).exp(),
        }


def _scored_blocks(
    rows: Sequence[Row], pairs: Callable[[Row], Pairs], subject: Subject
) -> Iterator[tuple[Sequence[Row], list[list[Scored]]]]:
    """Yields rows with the scores of their pairs, some rows at a time."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        made = [pairs(row) for row in block]
        scored = iter(subject.score([subject.encode_pair(*pair) for one in made for pair in one]))
        yield block, [list(itertools.islice(scored, len(one))) for one in made]


def _wrong(row: Row) -> str | None:
    """What is wrong with choices and gold; None = nothing."""
    choices, gold = row["choices"], row["gold"]
    texts = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
    if not (texts and choices):
        return f"choices must be a list of texts, none of them empty, got {choices!r}"
    if type(gold) is not int or gold not in range(len(choices)):
        return f"gold must be the index of a choice, 0 to {len(choices) - 1}, got {gold!r}"
    return None


def _in_turn(rows: Sequence[Row]) -> list[Row]:
    """The first row of every subject, then the second of each, and so on."""
    subjects: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        subjects[row["subject"]].append(row)
    turns = itertools.zip_longest(*subjects.values())
    return [row for turn in turns for row in turn if row is not None]


def _after_question(row: Row) -> Pairs:
    return [(f"Question: {row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]]


def _after_query(row: Row) -> Pairs:
    return [(row["query"], f" {choice}") for choice in row["choices"]]


_UNFINISHED = re.compile(r"([.!?]\S* )([^.!?]+)$")


def _after_scene(row: Row) -> Pairs:
    """HellaSwag: lm-eval begins the sentence to be finished with a capital, rows don't."""
    scene = _UNFINISHED.sub(lambda found: found[1] + found[2].capitalize(), row["query"])
    return [(scene, f" {choice}") for choice in row["choices"]]


def _after_passage(row: Row) -> Pairs:
    context = f"{row['context']}\nQuestion: {row['query']}\nAnswer:"
    return [(context, f" {choice}") for choice in row["choices"]]


def _after_contexts(row: Row) -> Pairs:
    return [(context, f" {row['continuation']}") for context in row["contexts"]]


def _last_word(row: Row) -> Pairs:
    return [(row["context"], f" {row['target']}")]


def _after_examples(row: Row) -> Pairs:
    """MMLU: five solved questions of the subject, the question, and letters to choose."""
    about = row["subject"].replace("_", " ")
    intro = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    examples = _examples().get(row["subject"], [])
    if not examples:
        raise ValueError(f"row {row['id']}: mmlu_dev has no examples of {row['subject']!r}")
    solved = "".join(f"{_lettered(example)} {'ABCD'[example['gold']]}\n\n" for example in examples)
    return [(intro + solved + _lettered(row), f" {letter}") for letter in "ABCD"]


def _lettered(row: Row) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([row["query"].strip(), *lines, "Answer:"])


@functools.cache
def _examples() -> dict[str, list[Row]]:
    """The five solved questions of every MMLU subject."""
    found: dict[str, list[Row]] = defaultdict(list)
    fields = ("subject", "query", "choices", "gold")
    for row in read_rows("eval/mmlu_dev.jsonl.gz", fields, wrong=_wrong):
        found[row["subject"]].append(row)
    return dict(found)


_BOTH = ("acc", "acc_norm")
TASKS = (
    Choice(name="piqa", pairs=_after_question, metrics=_BOTH),
    Choice(name="arc_easy", pairs=_after_question, metrics=_BOTH),
    Choice(name="arc_challenge", pairs=_after_question, metrics=_BOTH, metric="acc_norm"),
    Choice(name="hellaswag", pairs=_after_scene, metrics=_BOTH, metric="acc_norm"),
    Choice(name="openbookqa", pairs=_after_query, metrics=_BOTH, metric="acc_norm"),
    Choice(
        name="boolq", pairs=_after_passage, fields=("context", "query", "choices", "gold")
    ),
    Choice(
        name="winogrande", pairs=_after_contexts,
        fields=("contexts", "continuation", "choices", "gold"),
    ),
    Choice(
        name="mmlu", pairs=_after_examples, file="mmlu_test", by_subject=True,
        fields=("subject", "query", "choices", "gold"),
    ),
    LastWord(),
)  # fmt: skip
