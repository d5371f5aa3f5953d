"""Final answers are found and compared as people would."""

from __future__ import annotations

import doctest

import pytest

from cachefold.evaluation import answers
from cachefold.evaluation.answers import final_formula, final_number, same_formula, same_number
from cachefold.evaluation.task import get_task, read_rows
from tests.evaluation.test_code import Writer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+2 = 4\n#### 4", "4"),
        ("#### $1,234.50 and 7", "1234.50"),
        ("#### -3\n\nQuestion: 9", "-3"),
        ("She has 12 apples, so 5 are left.", "5"),
        ("It costs $18.", "18"),
        ("A total of 10,000.", "10000"),
        ("one. 3 - 2 = 1.", "1"),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_final_number(text, answer):
    assert final_number(text) == answer


def test_numbers_are_compared_by_value():
    assert same_number("18", "18.0") and same_number("1,000", "1000") and same_number("-3", "-3")
    assert not same_number("18", "180") and not same_number("3", "-3")
    assert not same_number("x", "x")


def test_the_final_formula():
    assert final_formula(r"\boxed{1}, no: \boxed{\frac{a}{\sqrt{b}}}.") == r"\frac{a}{\sqrt{b}}"
    assert final_formula("The final answer is $[2,5)$. I hope") == "$[2,5)$"
    assert final_formula("The answer is 2.5.") == "2.5"
    assert final_formula(r"cut off \boxed{\frac{1}{2}") is None
    assert final_formula("nothing") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac 34", r"\frac{3}{4}"),
        (r"\frac9{19}", r"\frac{9}{19}"),
        (r"\dfrac{1}{2}", "1/2"),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac{-2}{3}", r"-\frac{2}{3}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("x = 4", "4"),
        (r"25 \text{ ft}", "25"),
        (r"\$115,000", "115000"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"\text{Friday}", "Friday"),
        (".25", "0.25"),
        ("3.0", "3"),
        ("$2x+1$.", "2x + 1"),
    ],
)
def test_formulas_that_are_the_same(one, other):
    assert same_formula(one, other) and same_formula(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2", "-2"), ("12", "1"), ("(1,2)", "(2,1)"), (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("1,2", "12"), ("x^2", "x2"), ("1.5", "15"), (r"\sqrt{2}", "2"), ("", "0"), ("3.01", "3"),
        ("[2,5)", "(2,5]"), (r"\leftarrow", "arrow"),
    ],
)  # fmt: skip
def test_formulas_that_differ(one, other):
    assert not same_formula(one, other)


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_the_known_solutions_of_all_rows_are_right_and_those_of_other_rows_mostly_not(name):
    task = get_task(name)
    rows = task.rows(None)
    texts = [task.solution(row) for row in rows]
    right = [task.check(row, text) for row, text in zip(rows, texts, strict=True)]
    assert all(result["exact_match"] == 1.0 for result in right)
    others = zip(rows, [*texts[1:], texts[0]], strict=True)
    wrong = [task.check(row, text)["exact_match"] for row, text in others]
    assert sum(wrong) < 0.06 * len(rows)


@pytest.mark.parametrize(("name", "shots"), [("gsm8k", 8), ("math", 4)])
def test_solved_problems_stand_before_the_question_and_are_not_among_the_rows(name, shots):
    task = get_task(name)
    rows = task.rows(1)
    subject = Writer({"": task.solution(rows[0]) + "\n\nQuestion: more #### 1"})
    [result] = task.evaluate(rows, subject)
    [(prompt, _, _)] = subject.asked
    examples = read_rows(f"eval/{task.examples}.jsonl.gz", ("query",))
    assert len(examples) == shots and all(row["query"] in prompt for row in examples)
    assert prompt.endswith(task.question(rows[0])) and result["exact_match"] == 1.0
    assert not {row["query"] for row in examples} & {row["query"] for row in task.rows(None)}


def test_examples_run():
    assert doctest.testmod(answers).failed == 0
