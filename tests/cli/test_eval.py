"""`cachefold eval`."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
import torch

from cachefold.cli import eval as module
from cachefold.evaluation.report import write
from tests.cli.conftest import Run
from tests.evaluation.reports import report as made_up

SINGLE = Path(__file__).parents[2] / "artefacts" / "smollm2-135m-cr2"


@pytest.fixture(autouse=True)
def denormals() -> object:
    yield
    torch.set_flush_denormal(False)


def options(folder: Path, out: Path) -> list[object]:
    return [
        "--data", folder / "data", "--out", out, "--pieces", 2, "--tokens", 32, "--context", 64,
        "--dtype", "float32",
    ]  # fmt: skip


def test_table_files_and_resume(cli: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["eval", folder / "artefact", "--against", "tova,full,h2o-cr2+int8", "--cr", "2,4",
            "--codec", "none", *options(folder, out)]  # fmt: skip
    result = cli(*args)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "eval.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "dense", "artefact", "tova-cr2", "tova-cr4", "full", "h2o-cr2+int8",
    ]  # fmt: skip
    assert report["settings"]["model"] == str(folder / "base") and report["files"] == ["one", "two"]
    assert report["environment"]["torch"] == torch.__version__
    assert report["command"].startswith(f"cachefold eval {folder}/artefact --against tova,full")
    assert result.stdout.strip() == (out / "eval.md").read_text().strip()
    assert "| tova-cr4 |" in result.stdout and "tova-cr4: loss " in result.stderr
    assert f"report written to {out}" in result.stderr
    note = "artefact has one ratio and is measured at 2 only, not at 4."
    assert result.stderr.startswith(note) and f"\n{note}\n" in result.stdout
    assert cli(*args).stdout == result.stdout
    refused = cli(*args, "--limit", 3)
    assert refused.exit_code == 2 and "limit None there, 3 now" in refused.stderr


def test_the_recorded_command_gives_the_same_settings(cli: Run, folder: Path, tmp_path) -> None:
    args = ["eval", folder / "base", "--seed", 3, *options(folder, tmp_path)]
    assert cli(*args).exit_code == 0
    report = json.loads((tmp_path / "eval.json").read_text())
    again = cli(*report["command"].split()[1:])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "eval.json").read_text())["settings"] == report["settings"]


def test_from_a_report(cli: Run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    first = cli("eval", folder / "base", *options(folder, tmp_path))
    for name in ("eval.md", "eval.png"):
        (tmp_path / name).unlink()
    result = cli("eval", "--from", tmp_path / "eval.json")
    assert result.exit_code == 0 and result.stdout == first.stdout
    assert (tmp_path / "eval.md").exists() and (tmp_path / "eval.png").exists()
    assert cli("eval", "--from", tmp_path, "--out", tmp_path / "new").exit_code == 0
    assert (tmp_path / "new/eval.png").exists()
    assert "no report at" in cli("eval", "--from", tmp_path / "x.json").stderr
    monkeypatch.chdir(tmp_path)
    assert cli("eval", "--from", "eval.json", "--out", "runs/eval").exit_code == 0
    assert (tmp_path / "runs/eval/eval.png").exists()  # the usual folder, where it is asked for


def test_from_a_report_without_matplotlib(cli: Run, folder: Path, tmp_path: Path) -> None:
    first = cli("eval", folder / "base", *options(folder, tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachefold.evaluation.report.missing", lambda: "the picture needs x")
        for source in (tmp_path, tmp_path / "new"):
            result = cli("eval", "--from", source, "--out", tmp_path / "new")
            assert result.exit_code == 0 and "| dense |" in result.stdout
            assert result.stdout.count("No eval.png: the picture needs x.") == 1
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"eval.json", "eval.md"}
    again = cli("eval", "--from", tmp_path / "new")
    assert again.stdout == first.stdout and (tmp_path / "new/eval.png").exists()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--cr", "2"], "that --cr can't"),  # its default, but given
        (["smollm2-135m", "--batch-size", "2"], "that MODEL, --batch-size can't"),
    ],
)
def test_a_report_takes_no_other_option(cli: Run, tmp_path: Path, args, named: str) -> None:
    result = cli("eval", *args, "--from", tmp_path, "--out", tmp_path)
    assert result.exit_code == 2 and named in result.stderr and result.stderr.count("\n") == 1


def test_a_failure_ends_with_code_1(cli: Run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cachefold.evaluation.measure.at_context", lambda *args: 1 / 0)
    result = cli("eval", folder / "base", *options(folder, tmp_path))
    assert result.exit_code == 1
    assert "error: dense, cache and speed: ZeroDivisionError" in result.stderr
    assert "| dense | 1.00 |" in result.stdout


def test_an_artefact_by_its_policy(cli: Run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artefacts").mkdir()
    (tmp_path / "artefacts/mine").symlink_to(folder / "artefact")
    result = cli("eval", folder / "base", "--against", "dmc", *options(folder, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "| dmc-cr2 |" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--against", "tovaa"], "Did you mean 'tova'"),
        (["--against", "tova+itn4"], "Did you mean 'int4'"),
        (["--codec", "itn4"], "Did you mean 'int4'"),
        (["--tasks", "piqaa"], "Did you mean 'piqa'"),
        (["--cr", "2,x"], "a ratio is tokens seen / entries kept"),
        (["--cr", "0.5"], "at least 1"),
        (["--cr", ""], "at least 1"),
        (["artefacts/smollm2-135m-cr22"], "Did you mean 'artefacts/smollm2-135m-cr2'? `cachefold"),
        (["/nowhere/x"], "there is no artefact or model at /nowhere/x. `cachefold ls"),
        (["--against", "artefacts/smollm2-135m-cr22"], "artefacts/smollm2-135m-cr2'? Methods"),
        (["--dtype", "float61"], "Did you mean 'float16'"),
        (["--batch-size", "many"], "--batch-size takes numbers"),
        (["--data", "/nowhere"], "has no file of held-out text"),
        (["--against", "dms", "--cr", "32"], "cachefold retrofit"),
        ([str(SINGLE), "--cr", "4"], "has one ratio, 2, and nothing named takes --cr 4"),
        (["--against", f"{SINGLE},full+int4", "--cr", "4"], "has one ratio, 2, and nothing"),
    ],
)
def test_bad_input_teaches(cli: Run, tmp_path: Path, monkeypatch, args, message: str) -> None:
    def loaded(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("cachefold.evaluation.compare.load_base", loaded)
    result = cli("eval", "--out", tmp_path, *args)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file", "file/below/it"])
def test_an_out_that_is_a_file_is_refused(cli: Run, folder, tmp_path, monkeypatch, out) -> None:
    monkeypatch.setattr("cachefold.evaluation.compare.load_base", lambda *a: pytest.fail("loaded"))
    (tmp_path / "file").write_text("mine")
    report = tmp_path / "eval.json"
    write(made_up(), tmp_path, picture=False)
    for args in ([folder / "base"], ["--from", report]):
        result = cli("eval", *args, "--out", tmp_path / out)
        assert result.exit_code == 2 and f"as {tmp_path}/file is a file" in result.stderr
        assert result.stderr.count("\n") == 1 and not result.stdout
    assert (tmp_path / "file").read_text() == "mine"


def test_two_held_out_files_of_one_name_are_refused(cli: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "cachefold.evaluation.compare.load_base", lambda *args: pytest.fail("loaded")
    )
    for name in ("law.txt", "law.jsonl"):
        (tmp_path / name).write_text("{}")
    result = cli("eval", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "would both be called law: rename one" in result.stderr
    assert not (tmp_path / "out").exists()


def test_artefacts_are_found_beside_the_code_too(cli: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {"against": "artefacts/smollm2-135m-cr2+int4,artefacts/smollm2-135m-cr8,tova+int4"}
    methods = module._methods("smollm2-135m", asked | {"cr": "2", "codec": "none"})[1]
    assert [(method.name, method.artefact) for method in methods] == [
        ("dense", None), ("smollm2-135m-cr2+int4", SINGLE),
        ("smollm2-135m-cr8", SINGLE.with_name("smollm2-135m-cr8")),
        ("tova-cr2+int4", None),
    ]  # fmt: skip
    for words in (["artefacts/smollm2-135m-cr22"], ["--against", "artefacts/smollm2-135m-cr22"]):
        result = cli("eval", *words, "--data", SINGLE.parents[1] / "data/heldout")
        assert result.exit_code == 2 and "/smollm2-135m-cr2'? " in result.stderr


def test_a_run_that_is_not_there_gives_the_closest(cli: Run, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/final").symlink_to(folder / "artefact")
    for word in ("runs/firts", "runs/firts/final", "./runs/firts/final"):
        assert "Did you mean 'runs/first/final'?" in cli("eval", word).stderr


def test_a_hub_id_is_no_missing_folder(cli: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def absent(name: str) -> None:
        raise ValueError(f"{name} isn't on the hub")

    monkeypatch.setattr("cachefold.evaluation.compare.base_config", absent)
    assert "owner/model isn't on the hub" in cli("eval", "owner/model").stderr


def test_the_help_says_that_dials_take_ratios(cli: Run) -> None:
    assert "policies by name and of dials" in " ".join(cli("eval", "--help").stdout.split())


def test_an_unknown_model_teaches(cli: Run, tmp_path: Path) -> None:
    result = cli("eval", "smollm2-135", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "Did you mean 'smollm2-135m'" in result.stderr
    assert not (tmp_path / "x").exists()


def test_examples_run() -> None:
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
