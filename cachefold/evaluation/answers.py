"""Worked answers: GSM8K and MATH, exact match of the final answer after solved examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate, read_rows
from cachefold.evaluation.writing import means, written

Row: TypeAlias = dict[str, Any]

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_FIELDS = ("query", "solution", "answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTask:
    """Problems to be solved in words; `exact_match` looks at the final answer only."""

    name: str
    """Of the task."""
    file: str
    """Below the data folder's eval."""
    examples: str
    """File of solved problems that stand before each question."""
    question: Callable[[Row], str]
    """A problem, up to where the answer begins."""
    solution: Callable[[Row], str]
    """How a solved problem goes on."""
    final: Callable[[str], str | None]
    """Takes the final answer out of what a model wrote; None = there is none."""
    same: Callable[[str, str], bool]
    """Compares two final answers."""
    stop: tuple[str, ...]
    """Strings that end an answer."""
    max_new_tokens: int
    """Of an answer."""
    metric: str = "exact_match"
    higher_is_better: bool = True

    def rows(self, limit: int | None) -> list[Row]:
        """Rows of the data file; see `Task`."""
        return read_rows(f"eval/{self.file}.jsonl.gz", _FIELDS, limit)

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Lets the model solve each problem; results say what was taken as its final answer."""
        shots = "".join(
            f"{self.question(row)}{self.solution(row)}\n\n"
            for row in read_rows(f"eval/{self.examples}.jsonl.gz", _FIELDS)
        )
        answers = written(
            rows, lambda row: shots + self.question(row), subject,
            max_new_tokens=self.max_new_tokens, stop=self.stop,
        )  # fmt: skip
        for row, text in answers:
            yield {**self.check(row, text), "text": text}

    def check(self, row: Row, text: str) -> Row:
        """Judges what a model wrote: `id`, `exact_match` (0 or 1) and `answer`."""
        answer = self.final(text)
        right = answer is not None and self.same(answer, str(row["answer"]))
        return {"id": row["id"], "exact_match": float(right), "answer": answer}

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Mean over problems."""
        return means(results, "exact_match")


def final_number(text: str) -> str | None:
    """The number after `####`, else the last number, without commas and dollar signs.

    >>> final_number("so 2 + 3 = 5. #### 1,234"), final_number("It is $7.50."), final_number("no")
    ('1234', '7.50', None)
    """
    _, mark, after = text.partition("####")
    numbers = _NUMBER.findall(after if mark else text)
    if not numbers:
        return None
    return str(numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", "")


def same_number(one: str, other: str) -> bool:
    """Whether two numbers are equal, however they are written.

    >>> same_number("18.00", "18"), same_number("1,000", "1000"), same_number("18.5", "18")
    (True, True, False)
    """
    try:
        return Decimal(one.replace(",", "")) == Decimal(other.replace(",", ""))
    except InvalidOperation:
        return False


def final_formula(text: str) -> str | None:
    r"""What stands in the last `\boxed{}`, else behind `answer is`.

    >>> final_formula(r"thus \boxed{\frac{1}{2}}."), final_formula("The answer is $x$. I hope")
    ('\\frac{1}{2}', '$x$')
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place]
    said = re.findall(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", text, flags=re.MULTILINE)
    return str(said[-1]) if said else None


def same_formula(one: str, other: str) -> bool:
    r"""Whether two formulas are written alike, but for spaces, units and other trifles.

    The rules follow Hendrycks et al. 2021 (arXiv:2103.03874): strings, not algebra.

    >>> same_formula(r"\dfrac12", r"\frac{1}{2}"), same_formula("$x = 4$", "4")
    (True, True)
    >>> same_formula("2x", "x2")
    False
    """
    return _plain_formula(one) == _plain_formula(other)


_REMOVED = (
    r"\\left(?![a-z])", r"\\right(?![a-z])", r"\\[!,;: ]", r"\\quad", r"\\\$", r"\$", r"\\?%",
    r"\^\{?\\circ\}?", r"\\(?:text|mbox)\{ [^{}]*\}", r"\s+", r"(?<=\d),(?=\d{3}(?!\d))", r"\.$",
)  # fmt: skip
_REPLACED = (
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac(\d)\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
    (r"^[a-zA-Z](?:\(x\))?=(?=.)", ""),
    (r"\\frac\{-(\d+)\}", r"-\\frac{\1}"),
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"^(-?\d+)\.0+$", r"\1"),
    (r"^(-?)0\.50*$", r"\1\\frac{1}{2}"),
)


def _plain_formula(text: str) -> str:
    for pattern in _REMOVED:
        text = re.sub(pattern, "", text)
    for pattern, new in _REPLACED:
        text = re.sub(pattern, new, text)
    return text


TASKS = (
    AnswerTask(
        name="gsm8k", file="gsm8k_test", examples="gsm8k_fewshot",
        question=lambda row: f"Question: {row['query']}\nAnswer:",
        solution=lambda row: f" {row['solution']}\n#### {row['answer']}",
        final=final_number, same=same_number, stop=("Question:",), max_new_tokens=320,
    ),
    AnswerTask(
        name="math", file="math", examples="math_fewshot",
        question=lambda row: f"Problem:\n{row['query']}\n\nSolution:",
        solution=lambda row: f" {row['solution']}\nFinal Answer: The final answer is "
        f"${row['answer']}$. I hope it is correct.",
        final=final_formula, same=same_formula, stop=("Problem:", "I hope it is correct"),
        max_new_tokens=512,
    ),
)  # fmt: skip
