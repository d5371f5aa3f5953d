"""What a task is, and the tasks by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cachefold.core.names import closest
from cachefold.evaluation.subject import Subject
from cachefold.text import read_file

_MODULES = ("answers", "choice", "code", "perplexity", "retrieval")
"""Modules of this package that offer tasks, each in a tuple `TASKS`."""

_REPOSITORY_DATA = Path(__file__).parents[2] / "data"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its standard error.

    >>> Estimate.of([0.0, 1.0, 1.0, 1.0])
    Estimate(value=0.75, error=0.25, count=4)
    """

    value: float
    """The mean."""
    error: float
    """Standard error of the mean, nan for a single row."""
    count: int
    """Rows."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean of `values`, one for each row, with the error sqrt(s^2 / n), s^2 over n - 1.

        Raises:
            ValueError: no values.
        """
        count = len(values)
        if not count:
            raise ValueError("there is no row to take a mean of")
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, math.nan, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)

    def exp(self) -> Estimate:
        """From a loss to a perplexity: e to the value, with the error by the delta method.

        >>> Estimate(0.0, 0.1, 9).exp()
        Estimate(value=1.0, error=0.1, count=9)
        """
        value = math.exp(self.value)
        return Estimate(value, value * self.error, self.count)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f} (n={self.count})"


class Task(Protocol):
    """Rows to put to a model and how its answers are judged; a frozen dataclass."""

    @property
    def name(self) -> str:
        """Unique; also the name of its file in a result folder."""
        ...

    @property
    def metric(self) -> str:
        """Headline metric, a key of what `summarise` returns."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Of the headline metric."""
        ...

    def rows(self, limit: int | None) -> list[dict[str, Any]]:
        """The first `limit` rows, all with None; each has a unique `id`.

        Raises:
            ValueError: the file is missing, or a line of it is broken; names file and line.
        """
        ...

    def evaluate(
        self, rows: Sequence[dict[str, Any]], subject: Subject
    ) -> Iterator[dict[str, Any]]:
        """Yields one result for each row, in order: its `id`, and numbers by metric."""
        ...

    def summarise(self, results: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
        """Takes all results together, by metric, the headline first."""
        ...


def get_task(name: str) -> Task:
    """Finds a task; `passkey@4096` is a retrieval task at one prompt length in tokens.

    Raises:
        ValueError: unknown name, with the closest match, or a length for a task that has none.

    >>> get_task("piqa").metric
    'acc'
    """
    tasks = _tasks()
    base, mark, length = name.partition("@")
    if base not in tasks:
        allowed = list_tasks()
        raise ValueError(
            f"unknown task {base!r}.{closest(base, allowed)} Available: {', '.join(allowed)}."
        )
    task = tasks[base]
    if not mark:
        return task
    if not hasattr(task, "at") or not (length.isdecimal() and int(length)):
        sized = [one for one in list_tasks() if hasattr(tasks[one], "at")]
        raise ValueError(
            f"task {name!r}: write NAME@TOKENS, for example {sized[0]}@4096; only "
            f"{', '.join(sized)} are made to a length"
        )
    return task.at(int(length))


def list_tasks() -> list[str]:
    """Names of all tasks, sorted.

    >>> "lambada" in list_tasks()
    True
    """
    return sorted(_tasks())


def _tasks() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for name in _MODULES:
        for task in importlib.import_module(f"cachefold.evaluation.{name}").TASKS:
            assert task.name not in found, f"two tasks are called {task.name!r}"
            found[task.name] = task
    return found


def data_file(name: str) -> Path:
    """Where a file of the data folder is: below the working folder, else beside the code.

    Args:
        name: for example `eval/piqa.jsonl.gz`.

    Raises:
        ValueError: in neither place.
    """
    here = Path("data") / name
    for path in (here, _REPOSITORY_DATA / name):
        if path.is_file():
            return path
    raise ValueError(
        f"no data file {here} in {Path.cwd()} nor in {_REPOSITORY_DATA}; the files come with a "
        "clone of the repository, not with the installed package: run this inside the clone"
    )


def read_rows(
    name: str,
    required: Sequence[str],
    limit: int | None = None,
    wrong: Callable[[dict[str, Any]], str | None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Reads rows of a data file.

    Args:
        name: as in `data_file`.
        required: fields every row must have, beside `id`.
        limit: rows from the beginning; None = all.
        wrong: says what is wrong with a row that has them; None = nothing.

    Raises:
        ValueError: missing file, a broken line, a field that is missing or wrong; names file and
            line.
    """
    check_limit(limit)
    rows: list[dict[str, Any]] = []
    for place, row in read_file(data_file(name)):
        if limit is not None and len(rows) == limit:
            break
        missing = [field for field in ("id", *required) if field not in row]
        if missing:
            raise ValueError(f"{place}: the row has no {', '.join(map(repr, missing))}")
        if complaint := wrong(row):
            raise ValueError(f"{place}: {complaint}")
        rows.append(row)
    return rows


def check_limit(limit: int | None) -> None:
    """Refuses a number of rows below 1.

    Raises:
        ValueError: it is.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1 or None, got {limit}")
