"""Retrieval tasks: rows, prompts for the subject's tokenizer, and what counts as found."""

from __future__ import annotations

import doctest
import re

import pytest

from cachefold.evaluation import retrieval, writing
from cachefold.evaluation.haystack import KINDS
from cachefold.evaluation.retrieval import judge
from cachefold.evaluation.task import get_task


class Reader:
    """Stands for a subject that finds a number or the names by looking at the prompt."""

    max_length = 100_000

    def __init__(self, answer):
        self.answer = answer
        self.prompts = []

    def encode(self, text):
        return re.findall(r"\w+|[^\w\s]", text)

    def generate(self, prompts, *, max_new_tokens, stop):
        self.prompts += prompts
        return [self.answer(prompt) for prompt in prompts]


def _look_up(prompt):
    prefix = prompt[prompt.rindex("? ") + 2 :]
    return re.search(rf"{re.escape(prefix)} (\d+)", prompt)[1] + ". The"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "variable_tracking"])
def test_a_model_that_finds_everything_gets_everything(kind):
    task = get_task(kind)
    rows = task.rows(9)
    subject = Reader(_look_up)
    results = list(task.evaluate(rows, subject))
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    found = task.summarise(results)
    assert list(found) == ["accuracy", "accuracy@512", "accuracy@1024", "accuracy@2048"]
    assert all(estimate.value == 1.0 for estimate in found.values())
    for prompt, row, result in zip(subject.prompts, rows, results, strict=True):
        assert len(subject.encode(prompt)) == result["tokens"] <= row["length"]


def test_a_model_that_finds_nothing_gets_nothing():
    task = get_task("passkey")
    assert task.summarise(list(task.evaluate(task.rows(3), Reader(lambda _: " 1"))))[
        "accuracy"
    ].value == 0.0  # fmt: skip


def test_some_of_the_variables_are_a_share():
    def first(prompt):
        value = re.search(r"have the value (\d+)", prompt)[1]
        return re.search(rf"VAR (\w+) = {value}", prompt)[1]

    task = get_task("variable_tracking@700")
    found = task.summarise(list(task.evaluate(task.rows(4), Reader(first))))
    assert found["accuracy"].value == 0.0 and found["found"].value == 0.25


def test_rows_are_spread_over_lengths_and_depths():
    task = get_task("niah_single")
    rows = task.rows(None)
    assert len(rows) == 60 == len({row["id"] for row in rows})
    assert [row["length"] for row in rows[:3]] == [512, 1024, 2048]
    for count in (5, 10, 20):
        depths = sorted(row["depth"] for row in get_task("niah_single@512").rows(count))
        gaps = [b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        assert max(gaps) < 2 / count
    assert task.rows(4) == rows[:4]
    more = task.rows(70)  # they are made: a limit may also ask for more
    assert len(more) == 70 == len({row["id"] for row in more}) and more[:60] == rows
    with pytest.raises(ValueError, match="limit must be >= 1"):
        task.rows(0)


def test_a_task_at_one_length():
    task = get_task("kv_retrieval@3000")
    assert task.name == "kv_retrieval@3000" and {row["length"] for row in task.rows(5)} == {3000}
    for name in ("kv_retrieval@", "kv_retrieval@0", "kv_retrieval@-5", "kv_retrieval@4k"):
        with pytest.raises(ValueError, match="NAME@TOKENS"):
            get_task(name)
    with pytest.raises(ValueError, match="only .*passkey.* are made to a length"):
        get_task("humaneval@512")


def test_prompts_longer_than_the_model_reads_are_refused():
    subject = Reader(_look_up)
    subject.max_length = 520
    task = get_task("passkey@512")
    with pytest.raises(ValueError, match="row 512/0 has 51. tokens and its answer up to 16"):
        list(task.evaluate(task.rows(1), subject))


def test_answers_count_as_words_of_their_own():
    assert judge(" 12345.", ["12345"])["accuracy"] == 1.0
    assert judge("<12345>", ["12345"])["accuracy"] == 1.0
    assert judge("123456", ["12345"])["accuracy"] == 0.0
    assert judge("012345", ["12345"])["accuracy"] == 0.0
    assert judge("ABCD and EFGH", ["EFGH", "ABCD", "IJKL"]) == {
        "accuracy": 0.0, "found": pytest.approx(2 / 3),
    }  # fmt: skip


def test_longeval_asks_for_the_line_it_names():
    task = get_task("longeval_lines")
    rows = task.rows(None)

    def look_up(prompt):
        line = re.search(r"in line (\S+) is$", prompt)[1]
        return re.search(rf"line {line}: REGISTER_CONTENT is (<\d+>)", prompt)[1]

    results = list(task.evaluate(rows, Reader(look_up)))
    assert len(rows) == 60 and task.summarise(results)["accuracy"].value == 1.0


def test_examples_run():
    assert doctest.testmod(retrieval).failed == 0
    assert doctest.testmod(writing).failed == 0
