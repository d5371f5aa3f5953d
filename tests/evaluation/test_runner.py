"""Tasks are run, kept row by row, resumed, and fail on their own."""

from __future__ import annotations

import doctest
import json
import logging

import pytest

from cachefold import DMC, TOVA, fold
from cachefold.evaluation import choice
from cachefold.evaluation import runner as module
from cachefold.evaluation.choice import Choice
from cachefold.evaluation.runner import TasksFailed, run_tasks
from cachefold.evaluation.subject import Subject
from cachefold.policies import Full
from tests.evaluation.tiny import rows_of, tiny_tokenizer
from tests.models.tiny import scramble_decisions, tiny_model


class Tiny(Choice):
    """Twelve questions; breaks at a row when told to, and says what it was asked."""

    def rows(self, limit):
        return rows_of(12)[:limit]

    def evaluate(self, rows, subject):
        for row in rows:
            if row["id"] == BREAKS.get(self.name):
                raise RuntimeError("it broke")
            ASKED.append(row["id"])
            yield from super().evaluate([row], subject)


BREAKS: dict[str, str] = {}
ASKED: list[str] = []


def tiny(name="tiny", **options) -> Tiny:
    ASKED.clear()
    BREAKS.clear()
    metrics = ("acc", "acc_norm")
    return Tiny(name=name, pairs=choice._after_question, metrics=metrics, **options)


def subject(policy=None) -> Subject:
    model = tiny_model() if policy is None else fold(tiny_model(), policy)
    scramble_decisions(model)
    return Subject(model, tiny_tokenizer())


def test_doctests_run():
    assert doctest.testmod(module).failed == 0


def test_results_are_for_json_and_say_the_ratio():
    results = run_tasks(subject(DMC(delay=2)), [tiny()])
    found = json.loads(json.dumps(results, allow_nan=False))["tiny"]
    assert found["metric"] == "acc" and found["higher_is_better"] and found["count"] == 12
    assert found["metrics"]["acc"]["value"] == found["value"] and "acc_norm" in found["metrics"]
    assert found["cr"] > 1.2 and found["bytes_ratio"] < 0.9 and found["tokens"] > 100
    [one] = run_tasks(subject(), [tiny()], limit=1).values()
    assert one["error"] is None and one["cr"] == 1.0


def test_rows_done_are_not_run_again(tmp_path):
    whole = run_tasks(subject(DMC(delay=2)), [tiny()])["tiny"]
    broken = tiny()
    BREAKS["tiny"] = "row/5"
    with pytest.raises(TasksFailed, match="it broke"):
        run_tasks(subject(DMC(delay=2)), [broken], store=tmp_path)
    with (tmp_path / "tiny.jsonl").open("a") as file:
        file.write('{"result": {"id": "ro')  # stopped while it wrote
    resumed = run_tasks(subject(DMC(delay=2)), [tiny()], store=tmp_path)["tiny"]
    assert ASKED == [f"row/{index}" for index in range(5, 12)]
    for key in ("value", "error", "count", "cr", "bytes_ratio", "tokens"):
        assert resumed[key] == pytest.approx(whole[key])
    assert resumed["metrics"] == whole["metrics"]
    run_tasks(subject(DMC(delay=2)), [tiny()], store=tmp_path)
    assert ASKED == []


def test_more_rows_go_on_from_fewer(tmp_path):
    run_tasks(subject(), [tiny()], limit=4, store=tmp_path)
    assert run_tasks(subject(), [tiny()], limit=6, store=tmp_path)["tiny"]["count"] == 6
    assert ASKED == ["row/4", "row/5"]
    assert run_tasks(subject(), [tiny()], limit=2, store=tmp_path)["tiny"]["count"] == 2


class Together(Tiny):
    """Scores all rows it is given before it yields the first."""

    def evaluate(self, rows, subject):
        ASKED.extend(row["id"] for row in rows)
        yield from Choice.evaluate(self, rows, subject)


def together(limit=None, store=None) -> dict:
    ASKED.clear()
    task = Together(name="tiny", pairs=choice._after_question)
    found = run_tasks(subject(DMC(delay=2)), [task], limit=limit, store=store)["tiny"]
    del found["seconds"]
    return found


def test_bytes_of_rows_beyond_the_limit_do_not_count(tmp_path, caplog):
    whole = together(store=tmp_path)
    assert len(ASKED) == 12
    few = together(limit=4, store=tmp_path)
    assert few == together(limit=4) and few["tokens"] < whole["tokens"] / 2
    assert "tiny: 4 rows run again" in caplog.text
    caplog.clear()
    # Both are kept, and of rows that ran twice each limit takes those that ran for it.
    assert together(limit=4, store=tmp_path) == few and ASKED == []
    assert together(store=tmp_path) == whole and ASKED == []
    assert together(limit=6, store=tmp_path)["tokens"] == together(limit=6)["tokens"]
    assert caplog.text.count("run again") == 1
    together(limit=6, store=tmp_path)
    assert ASKED == []


def test_results_of_other_settings_are_refused(tmp_path):
    run_tasks(subject(), [tiny()], limit=2, store=tmp_path)
    with pytest.raises(TasksFailed, match="other settings .*policy None there"):
        run_tasks(subject(TOVA(cr=2)), [tiny()], store=tmp_path)
    with pytest.raises(TasksFailed, match="other settings .*task"):
        run_tasks(subject(), [tiny(metric="acc_norm")], store=tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    run_tasks(subject(), [tiny()], limit=2, store=tmp_path)
    path = tmp_path / "tiny.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(TasksFailed, match=r"tiny.jsonl:2 is damaged"):
        run_tasks(subject(), [tiny()], store=tmp_path)


def test_a_task_that_breaks_leaves_the_others(tmp_path):
    tasks = [tiny(), tiny("good")]
    BREAKS["tiny"] = "row/0"
    with pytest.raises(TasksFailed, match="1 of 2 tasks failed: tiny: .*it broke") as caught:
        run_tasks(subject(), tasks, limit=3, store=tmp_path)
    assert list(caught.value.results) == ["good"] and list(caught.value.errors) == ["tiny"]
    assert caught.value.results["good"]["count"] == 3


def test_a_policy_that_kept_everything_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        run_tasks(subject(TOVA(budget=512)), [tiny()], limit=2)
    assert "kept every entry" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_tasks(subject(TOVA(cr=2)), [tiny()], limit=2)
        run_tasks(subject(), [tiny()], limit=2)
    assert "kept every entry" not in caplog.text


class Short(Tiny):
    """Texts of a few tokens, or of more than a page."""

    def rows(self, limit):
        query = "what" if self.name == "short" else "what is so " * 9
        return [row | {"query": query, "choices": ["is", "or"]} for row in rows_of(2)]


@pytest.mark.parametrize("policy", [Full(), DMC(delay=2)])
def test_a_codec_that_packed_nothing_is_told(policy, caplog):
    model = fold(tiny_model(), policy)
    packed = Subject(model, tiny_tokenizer(), codec="int8")
    with caplog.at_level(logging.WARNING):
        run_tasks(packed, [Short(name="short", pairs=choice._after_question)])
    assert "int8' packed next to nothing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_tasks(packed, [Short(name="long", pairs=choice._after_question)])
    assert "packed next to nothing" not in caplog.text
