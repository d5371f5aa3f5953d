"""Code: HumanEval and MBPP, pass@1 of one greedy answer, run in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cachefold.evaluation.sandbox import Sandbox, best_protection
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate, read_rows
from cachefold.evaluation.writing import means, written

Row: TypeAlias = dict[str, Any]

_TOP_LEVEL = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n```")
"""What ends the body of a function, as in Chen et al. 2021."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTask:
    """Problems whose answers are run against tests; `pass@1` is the share that passes.

    Results also say why an answer failed, and under which protection it ran.
    """

    name: str
    """Of the task."""
    file: str
    """Below the data folder's eval."""
    fields: tuple[str, ...]
    """Every row has them."""
    prompt: Callable[[Row], str]
    """Text to continue."""
    program: Callable[[Row, str], str]
    """What is run of a row and an answer."""
    stop: tuple[str, ...]
    """Strings that end an answer."""
    max_new_tokens: int = 384
    """Of an answer."""
    timeout: float = 10.0
    """Seconds a program may take."""
    memory: int = 1 << 30
    """Bytes a program may take."""
    metric: str = "pass@1"
    higher_is_better: bool = True

    def rows(self, limit: int | None) -> list[Row]:
        """Rows of the data file; see `Task`."""
        return read_rows(f"eval/{self.file}.jsonl.gz", self.fields, limit)

    def evaluate(self, rows: Sequence[Row], subject: Subject) -> Iterator[Row]:
        """Lets the model write each answer, then runs it.

        Raises:
            RuntimeError: programs can't be confined on this machine; said before anything else.
        """
        best_protection()
        answers = written(
            rows, self.prompt, subject, max_new_tokens=self.max_new_tokens, stop=self.stop
        )
        for row, answer in answers:
            yield {**self.check(row, answer), "text": answer}

    def check(self, row: Row, answer: str) -> Row:
        """Runs one answer.

        Args:
            row: the problem.
            answer: what follows its prompt.

        Returns:
            `id`, `pass@1` (0 or 1), `reason` and `protection`.

        Raises:
            RuntimeError: the sandbox could not be set up.
        """
        sandbox = Sandbox(timeout=self.timeout, memory=self.memory)
        outcome = sandbox.run(self.program(row, answer))
        return {
            "id": row["id"], "pass@1": float(outcome.passed), "reason": outcome.reason,
            "protection": outcome.protection,
        }  # fmt: skip

    def summarise(self, results: Sequence[Row]) -> dict[str, Estimate]:
        """Mean over problems."""
        return means(results, "pass@1")


def _humaneval_prompt(row: Row) -> str:
    """Without the line break at its end: models write it together with the indent, as one token."""
    return str(row["prompt"].rstrip())


def _humaneval_program(row: Row, answer: str) -> str:
    function = f"{_humaneval_prompt(row)}\n{answer.removeprefix(chr(10))}"
    return f"{function}\n{row['test']}\ncheck({row['entry_point']})\n"


def _mbpp_question(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['query']} Your code "
        f"should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp_prompt(row: Row) -> str:
    """Three solved problems before the question, as in Austin et al. 2021."""
    solved = read_rows("eval/mbpp_fewshot.jsonl.gz", _MBPP_FIELDS)
    shots = [f"{_mbpp_question(shot)}{shot['canonical_solution']}\n[DONE]\n\n" for shot in solved]
    return "".join(shots) + _mbpp_question(row)


def _mbpp_program(row: Row, answer: str) -> str:
    # The set-up may use classes of the answer.
    return "\n".join([answer, row["test_setup_code"], *row["test_list"]]) + "\n"


_MBPP_FIELDS = ("query", "test_list", "test_setup_code", "canonical_solution")

TASKS = (
    CodeTask(
        name="humaneval", file="humaneval", fields=("prompt", "entry_point", "test"),
        prompt=_humaneval_prompt, program=_humaneval_program, stop=_TOP_LEVEL,
    ),
    CodeTask(
        name="mbpp", file="mbpp_test", fields=_MBPP_FIELDS, prompt=_mbpp_prompt,
        program=_mbpp_program, stop=("[DONE]",), max_new_tokens=256,
    ),
)  # fmt: skip
