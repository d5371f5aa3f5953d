"""Files of a report."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from cachefold.benchmark.report import Report

ROWS = [
    {"kind": "attention", "batch": b, "context": 64, "cr": cr, "cr_imposed": True, "ms": 1.5,
     "speedup_dense": cr}
    for b in (1, 8) for cr in (1.0, 2.0, 4.0)
]  # fmt: skip


def test_files_are_whole_after_every_row(tmp_path):
    report = Report({"command": "x"}, tmp_path / "r.json", tmp_path / "r.csv")
    for count, row in enumerate(ROWS, 1):
        report.add(row)
        assert json.loads((tmp_path / "r.json").read_text())["rows"] == ROWS[:count]
    report.add({"kind": "llama.cpp", "tokens_per_s": 3.0})
    report.fail("prefill", "it broke")
    report.note("No anchor.")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["command"] == "x" and found["notes"] == ["No anchor."]
    assert found["failures"] == [{"part": "prefill", "reason": "it broke"}]
    with open(tmp_path / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and rows[-1]["tokens_per_s"] == "3.0" and rows[-1]["ms"] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.csv", "r.json"]


@pytest.mark.parametrize("option", ["json", "csv", "plot"])
def test_files_are_checked_before_anything_is_measured(tmp_path, option):
    with pytest.raises(ValueError, match=f"--{option}.*can't be written.*mkdir -p"):
        Report({}, **{f"{option}_path": tmp_path / "nowhere" / "x.png"})
    with pytest.raises(ValueError, match="can't be written"):
        Report({}, **{f"{option}_path": tmp_path})


def test_markdown_says_what_is_imposed_and_missing():
    report = Report({})
    report.add({"kind": "llama.cpp", "batch": 1, "context": 64, "tokens_per_s": 5.0})
    assert "imposed" not in report.markdown()
    for row in ROWS:
        report.add(row)
    report.fail("prefill", "it broke")
    report.note("No anchor.")
    text = report.markdown()
    assert text.startswith("cr is imposed") and "| 8 | 64 | 4 |" in text
    assert "**prefill** failed: it broke" in text and text.endswith("No anchor.")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = Report({}, plot_path=tmp_path / "r.png")
    report.plot()
    assert not (tmp_path / "r.png").exists()  # nothing to draw
    report.add({"kind": "llama.cpp", "batch": 1, "context": 64})
    report.plot()
    assert not (tmp_path / "r.png").exists()
    for row in ROWS:
        report.add(row)
    report.plot()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ends in .png"):
        Report({}, plot_path=tmp_path / "r.jpeg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        Report({}, plot_path=tmp_path / "r.png")
