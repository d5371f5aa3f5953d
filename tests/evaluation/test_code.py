"""Code tasks: what is put to the model, what is run, and that right answers pass."""

from __future__ import annotations

import doctest
import sys

import pytest

from cachefold.evaluation import code
from cachefold.evaluation.task import get_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
NAMES = ("humaneval", "mbpp")


class Writer:
    """Stands for a subject; answers are looked up by what the prompt contains."""

    max_length = 10_000

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def encode(self, text):
        return text.split()

    def generate(self, prompts, *, max_new_tokens, stop):
        self.asked += [(prompt, max_new_tokens, stop) for prompt in prompts]
        found = []
        for prompt in prompts:
            text = next(answer for mark, answer in self.answers.items() if mark in prompt)
            cuts = [text.index(mark) for mark in stop if mark in text]
            found.append(text[: min(cuts, default=len(text))])
        return found


def _failures(name, rows):
    task = get_task(name)
    results = [task.check(row, row["canonical_solution"]) for row in rows]
    return {result["id"]: result["reason"] for result in results if result["pass@1"] != 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_some_known_solutions_pass(name):
    rows = get_task(name).rows(None)
    assert not _failures(name, rows[:: len(rows) // 6])


def test_a_set_up_may_use_classes_of_the_answer():
    [row] = [row for row in get_task("mbpp").rows(None) if row["test_setup_code"]]
    assert not _failures("mbpp", [row])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("mbpp", 500)])
def test_all_known_solutions_pass(name, count):
    rows = get_task(name).rows(None)
    assert len(rows) == count and not _failures(name, rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "answer", ["", "    pass\n", "    import sys; sys.exit(0)\n", "import os; os._exit(0)\n", "x("]
)
def test_answers_that_solve_nothing_fail(name, answer):
    task = get_task(name)
    for row in task.rows(2):
        result = task.check(row, answer)
        assert result["pass@1"] == 0.0 and result["reason"] != "passed"


def test_humaneval_from_prompt_to_score():
    task = get_task("humaneval")
    rows = task.rows(2)
    right = "\n" + rows[0]["canonical_solution"] + "\ndef something_else(:"
    wrong = "\n    return None\n"
    subject = Writer({"has_close_elements": right, "separate_paren_groups": wrong})
    results = list(task.evaluate(rows, subject))
    assert [(r["id"], r["pass@1"]) for r in results] == [("HumanEval/0", 1.0), ("HumanEval/1", 0.0)]
    assert results[1]["reason"].startswith(("AssertionError", "TypeError"))
    assert results[0]["protection"] in ("namespaces", "seccomp", "audit")
    assert subject.asked[0][0] == rows[0]["prompt"].rstrip()
    assert task.summarise(results)["pass@1"].value == 0.5


def test_mbpp_shows_solved_problems_and_the_tests():
    task = get_task("mbpp")
    rows = task.rows(1)
    subject = Writer({"": rows[0]["canonical_solution"] + "\n[DONE]\n\nYou are"})
    [result] = task.evaluate(rows, subject)
    [(prompt, _, _)] = subject.asked
    assert result["pass@1"] == 1.0
    assert prompt.count("[BEGIN]") == 4 and prompt.count("[DONE]") == 3
    assert all(test in prompt for test in rows[0]["test_list"]) and prompt.endswith("[BEGIN]\n")
    assert rows[0]["canonical_solution"] not in prompt


def test_prompts_that_would_be_cut_are_refused():
    task = get_task("humaneval")
    subject = Writer({"": ""})
    subject.max_length = 385
    with pytest.raises(ValueError, match="HumanEval/0 has .* tokens.*reads at most 385"):
        list(task.evaluate(task.rows(1), subject))


def test_a_machine_without_protection_is_told_first(monkeypatch):
    monkeypatch.setattr("cachefold.evaluation.code.best_protection", _none)
    task = get_task("mbpp")
    subject = Writer({"": ""})
    with pytest.raises(RuntimeError, match="no protection"):
        list(task.evaluate(task.rows(1), subject))
    assert not subject.asked


def _none():
    raise RuntimeError("no protection works on this machine")


def test_examples_run():
    assert doctest.testmod(code).failed == 0
