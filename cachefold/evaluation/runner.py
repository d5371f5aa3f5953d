"""Runs tasks on a subject, keeps every finished row, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cachefold.evaluation.footprint import Footprint
from cachefold.evaluation.store import refuse_other
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import Estimate, Task

logger = logging.getLogger(__name__)

HARDLY_PACKED = 0.95
"""Bytes of a kept entry in those of a dense one, from which on a codec is said to have done
nothing."""


class TasksFailed(RuntimeError):
    """Some tasks broke; the others are finished.

    Attributes:
        results: of the tasks that are finished, by name.
        errors: of the others, by name.
    """

    def __init__(self, results: dict[str, dict[str, Any]], errors: dict[str, Exception]) -> None:
        """Says which and why."""
        reasons = "; ".join(f"{name}: {_reason(error)}" for name, error in errors.items())
        super().__init__(f"{len(errors)} of {len(results) + len(errors)} tasks failed: {reasons}")
        self.results = results
        self.errors = errors


def run_tasks(
    subject: Subject, tasks: Sequence[Task], *, limit: int | None = None, store: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Runs tasks one after the other.

    Args:
        subject: the model under test.
        tasks: each with a name of its own.
        limit: most rows of each, see `Task.rows`; None = all.
        store: folder with one JSON-lines file for each task. Rows found there are not run again;
            None = nothing is kept. A smaller limit runs those again that ran together with rows
            beyond it: how much their texts filled is known only of all together.

    Returns:
        By name of the task, for JSON: `metric`, `higher_is_better`, `value`, `error` (standard
        error, None for one row) and `count` of the headline; `metrics`, the same three for all
        metrics; `cr` and `bytes_ratio` of the texts (see `Footprint`), `tokens` seen; `seconds`
        that this call took.

    Raises:
        TasksFailed: at the end, when tasks broke; it has the results of the others.
    """
    results: dict[str, dict[str, Any]] = {}
    errors: dict[str, Exception] = {}
    for task in tasks:
        try:
            results[task.name] = _run_task(subject, task, limit, store)
        except Exception as error:  # whatever it is, the tasks that follow are still wanted
            errors[task.name] = error
            logger.error("%s failed: %s", task.name, _reason(error))
    if errors:
        raise TasksFailed(results, errors) from next(iter(errors.values()))
    return results


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)


def _run_task(
    subject: Subject, task: Task, limit: int | None, store: Path | None
) -> dict[str, Any]:
    start = time.monotonic()
    rows = task.rows(limit)
    if not rows:
        raise ValueError(f"task {task.name} has no rows")
    log = ResultLog(None if store is None else store / f"{task.name}.jsonl", _facts(task, subject))
    ids = [row["id"] for row in rows]
    done = log.take(ids)
    left = [row for row in rows if row["id"] not in done.results]
    _tell_left(task.name, len(rows), len(left), sum(log.has(row["id"]) for row in left))
    before = subject.footprint
    for row, result in zip(left, task.evaluate(left, subject), strict=True):
        assert result["id"] == row["id"], f"{task.name}: result {result['id']} for row {row['id']}"
        spent, before = subject.footprint - before, subject.footprint
        log.add(result, spent)
        done.add(result, spent)
    footprint = done.footprint
    _check_seen(subject, task.name, footprint)
    found = task.summarise([done.results[id_] for id_ in ids])
    logger.info("%s: %s %s | %s", task.name, task.metric, found[task.metric], footprint)
    return {
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        **_plain(found[task.metric]),
        "metrics": {name: _plain(estimate) for name, estimate in found.items()},
        "cr": footprint.cr,
        "bytes_ratio": footprint.bytes_ratio,
        "tokens": footprint.tokens,
        "seconds": time.monotonic() - start,
    }


def _tell_left(name: str, count: int, left: int, again: int) -> None:
    """Tells what of `count` rows is done already, and what is done and runs again all the same."""
    if left < count:
        logger.info("%s: %d of %d rows are done already", name, count - left, count)
    if again:
        logger.warning(
            "%s: %d rows run again: they ran together with rows that are left out now, and the "
            "bytes of their texts are known only in all",
            name, again,
        )  # fmt: skip


def _plain(estimate: Estimate) -> dict[str, Any]:
    """For JSON, which knows no nan."""
    error = None if math.isnan(estimate.error) else estimate.error
    return {"value": estimate.value, "error": error, "count": estimate.count}


def _facts(task: Task, subject: Subject) -> dict[str, Any]:
    """What results depend on, JSON values."""
    options: Any = task
    plain = {
        field.name: getattr(task, field.name)
        for field in dataclasses.fields(options)
        if not callable(getattr(task, field.name))
    }
    return {"name": task.name, "task": plain} | subject.settings()


def _check_seen(subject: Subject, name: str, footprint: Footprint) -> None:
    """Tells when nothing was compressed: the score is then that of a dense cache."""
    policy = subject.settings()["policy"]
    asked = policy is not None and (policy.get("budget") or (policy.get("cr") or 1) > 1)
    if asked and footprint.cr == 1:
        logger.warning(
            "%s: policy %r kept every entry of these texts, so its score says nothing about "
            "compression: the texts are too short for it, or it isn't trained",
            name, policy["name"],
        )  # fmt: skip
    # Bytes of an entry that is kept, in those of a dense one.
    if subject.packs_pages and footprint.bytes_ratio * footprint.cr > HARDLY_PACKED:
        logger.warning(
            "%s: codec %r packed next to nothing of these texts, so its score says nothing about "
            "it: the first entries and the newest stay exact, and these texts are hardly longer",
            name, subject.codec,
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class Done:
    """Rows that ran, with the footprint of all their texts.

    >>> done = Done()
    >>> done.add({"id": "a", "acc": 1.0}, Footprint(10, 5.0, 1, 2))
    >>> list(done.results), done.footprint.cr
    (['a'], 2.0)
    """

    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By id of the row."""
    footprint: Footprint = dataclasses.field(default_factory=Footprint)

    def add(self, result: dict[str, Any], footprint: Footprint) -> None:
        """Takes a row in."""
        self.results[result["id"]] = result
        self.footprint += footprint


class ResultLog:
    """Results of one task, in a file that grows row by row.

    Texts of several rows run together. Their footprint stands with the first of these rows, and
    the others, up to the next one that has a footprint, have an empty one: a block.

    Args:
        path: of the file; None = only in memory.
        facts: what the results depend on, JSON values.

    Raises:
        ValueError: the file is damaged, or belongs to other facts; says which differ.

    >>> log = ResultLog(None, {})
    >>> log.add({"id": "a", "acc": 1.0}, Footprint(10, 5.0, 1, 2))
    >>> log.add({"id": "b", "acc": 0.0}, Footprint())
    >>> log.take(["a", "b", "c"]).footprint.cr, log.take(["a"]).results
    (2.0, {})
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path = path
        self._blocks: list[Done] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_lines(path))
        if not lines:
            self._write({"settings": facts}, "w")
            return
        refuse_other(f"{path} has results", lines[0].get("settings", {}), facts)
        for line in lines[1:]:
            self._take(line["result"], Footprint(*line["footprint"]))

    def add(self, result: dict[str, Any], footprint: Footprint) -> None:
        """Keeps the result of a row, with the footprint of the texts that ran for it."""
        self._take(result, footprint)
        if self.path is not None:
            self._write({"result": result, "footprint": dataclasses.astuple(footprint)}, "a")

    def has(self, id_: str) -> bool:
        """Whether the row ever ran."""
        return any(id_ in block.results for block in self._blocks)

    def take(self, ids: Sequence[str]) -> Done:
        """Those of these rows that ran in blocks of nothing but these rows.

        The footprint of any other block counts rows that are not wanted. Rows that ran twice are
        in two blocks, of which the longer one is taken.
        """
        left, done = set(ids), Done()
        for block in sorted(self._blocks, key=lambda block: -len(block.results)):
            if block.results.keys() <= left:
                left -= block.results.keys()
                done.results |= block.results
                done.footprint += block.footprint
        return done

    def _take(self, result: dict[str, Any], footprint: Footprint) -> None:
        if footprint.tokens or not self._blocks:
            self._blocks.append(Done())
        self._blocks[-1].add(result, footprint)

    def _write(self, line: dict[str, Any], mode: str) -> None:
        assert self.path is not None
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a result file; what was written of a line when the run was stopped is cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise _damaged(path, number) from error
        wanted = {"settings"} if number == 1 else {"result", "footprint"}
        if not isinstance(found, dict) or set(found) != wanted:
            raise _damaged(path, number)
        yield found


def _damaged(path: Path, number: int) -> ValueError:
    return ValueError(f"{path}:{number} is damaged; delete the file to run its task again")
