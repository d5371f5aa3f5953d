"""Table, JSON and files of a comparison."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from cachefold.evaluation import report as module
from cachefold.evaluation.report import markdown, read, write
from tests.evaluation.reports import report


def test_files_are_written_and_read_again(tmp_path: Path) -> None:
    made = report()
    files = write(made, tmp_path / "new")
    assert [file.name for file in files] == ["eval.json", "eval.md", "eval.png"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "eval.json",
        "eval.md",
        "eval.png",
    ]
    again = read(tmp_path / "new")
    assert {**again, "format": None} == {**made, "format": None}
    assert markdown(again) + "\n" == files[1].read_text()
    assert read(files[0]) == again


def test_table() -> None:
    text = markdown(report())
    lines = text.splitlines()
    assert lines[0].startswith("m in float32; a CPU, 2 threads;") and "--against tova" in lines[0]
    assert (
        "| method | cr | cache MiB at 2048 | of dense | tok/s | loss | increase | piqa |" in lines
    )
    tova = "| tova-cr2 | 2.00 | 22.50 | 0.500 | 20.0 | 3.1000 | +0.1000 (0.0020) | "
    assert tova + "0.630 (0.020) at 1.60 |" in lines
    assert "| random-cr8 | 8.00 | 5.60 | 0.124 | 20.0 | 5.2000 | +2.2000 (0.0020) |  |" in lines
    assert "| 0.540 |" in text  # no error of a single row
    assert "**h2o-cr2**, method: it broke" in lines
    assert "mean over chat, code, at most 6 pieces of 1024 tokens" in text
    assert "piqa: acc, 100 rows." in text


def test_what_is_missing_stays_empty() -> None:
    assert "| h2o-cr2 | 2.00 |  |  | 20.0 |  |  |  |" in markdown(report())
    nothing = report() | {"rows": []}
    assert "| method |" not in markdown(nothing)


def test_no_picture_where_nothing_was_measured(tmp_path: Path) -> None:
    made = report()
    made["rows"] = made["rows"][-1:]
    assert [file.name for file in write(made, tmp_path)] == ["eval.json", "eval.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "no report"), ('{"format": 0, "rows": []}', "format 0")],
)
def test_read_refuses(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    with pytest.raises(ValueError, match="no report at"):
        read(tmp_path / "other.json")


def test_json_has_no_nan(tmp_path: Path) -> None:
    made = report()
    made["rows"][0]["increase_error"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(made, tmp_path)
    assert not list(tmp_path.glob("eval.json"))
    write(report(), tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["format"] == 1


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
