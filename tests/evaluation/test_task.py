"""Names of tasks, rows of files, and means with errors."""

from __future__ import annotations

import doctest
import math

import pytest

from cachefold.evaluation import footprint, greedy, perplexity, reading, scoring
from cachefold.evaluation import task as module
from cachefold.evaluation.task import Estimate, get_task, list_tasks, read_rows


@pytest.mark.parametrize("part", [module, footprint, greedy, perplexity, reading, scoring])
def test_doctests_run(part):
    result = doctest.testmod(part)
    assert result.attempted and not result.failed


def test_every_task_has_rows_with_ids_of_their_own_and_a_headline():
    for name in list_tasks():
        task = get_task(name)
        rows = task.rows(7)
        assert task.name == name and 0 < len(rows) <= 7
        assert len({row["id"] for row in rows}) == len(rows)
        assert isinstance(task.metric, str) and isinstance(task.higher_is_better, bool)


def test_an_unknown_task_is_told_the_closest():
    with pytest.raises(ValueError, match="Did you mean 'hellaswag'"):
        get_task("helaswag")


def test_broken_rows_name_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "rows.jsonl"
    path.write_text('{"id": "a", "query": "x"}\n{"id": "b"}\n')
    assert len(read_rows("rows.jsonl", ("query",), limit=1)) == 1
    with pytest.raises(ValueError, match="rows.jsonl:2: the row has no 'query'"):
        read_rows("rows.jsonl", ("query",))
    path.write_text('{"id": "a"}\n{"id": \n')
    with pytest.raises(ValueError, match="rows.jsonl:2: not valid JSON"):
        read_rows("rows.jsonl", ())
    with pytest.raises(ValueError, match="clone"):
        read_rows("none.jsonl", ())
    with pytest.raises(ValueError, match="limit"):
        read_rows("rows.jsonl", (), limit=0)


def test_the_error_of_an_accuracy_is_the_usual_one():
    values = [1.0] * 30 + [0.0] * 70
    found = Estimate.of(values)
    assert found.value == pytest.approx(0.3) and found.count == 100
    assert found.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert math.isnan(Estimate.of([0.5]).error)
    assert Estimate(1.0, 0.1, 9).exp().error == pytest.approx(0.1 * math.e)
