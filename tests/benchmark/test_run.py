"""A whole run, and the command line."""

from __future__ import annotations

import doctest
import json

import pytest
from typer.testing import CliRunner

from cachefold.benchmark import attention, generate, llama
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.parity import ParityError
from cachefold.benchmark.run import Run
from cachefold.cli import app, bench

ROW = {
    "kind": "llama.cpp", "batch": 1, "context": 64, "tokens_per_s": 5.0, "prefill_ms": 1.0,
}  # fmt: skip


def _cli(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


@pytest.fixture
def parts(monkeypatch):
    """Attention fails as asked, the anchor gives one row."""

    def fail_with(error: BaseException | None):
        def broken(*args):
            yield dict(ROW)
            if error is not None:
                raise error

        monkeypatch.setattr(attention, "measure", broken)
        monkeypatch.setattr(llama, "missing", lambda model: None)
        monkeypatch.setattr(llama, "measure", lambda config: iter([dict(ROW)]))

    return fail_with


@pytest.mark.parametrize("error", [ParityError("off"), MemoryError("m"), KeyError("k")])
def test_a_part_that_fails_costs_no_other(parts, tmp_path, error):
    parts(error)
    path = tmp_path / "r.json"
    run = Run(BenchConfig(parts=("attention", "llama")), "x", json_path=path)
    assert not run.measure()
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 2 and [one["part"] for one in found["failures"]] == ["attention"]
    assert found["seed"] == 0 and found["options"]["backend"] == "auto"
    assert found["environment"]["load_at_end"] >= 0 and found["bandwidth"]["gbps"] > 0


def test_ctrl_c_keeps_what_is_done(parts, tmp_path):
    parts(KeyboardInterrupt())
    result = _cli("--attention", "--json", tmp_path / "r.json")
    assert result.exit_code == 130
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"] == [ROW] and "interrupted" in found["failures"][0]["reason"]
    assert "| 1 | 64 |" in result.stdout


def test_a_missing_anchor_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(llama, "missing", lambda model: "run `pip install it`")
    result = _cli("--llama", "--json", tmp_path / "r.json")
    assert result.exit_code == 0 and "No llama.cpp anchor: run `pip install it`." in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["failures"] == []


def test_failed_check_prints_no_figures(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ParityError("backend reference: relative error 0.5")

    monkeypatch.setattr(attention, "check_backend", fail)
    result = _cli("--backend", "reference", "--json", tmp_path / "r.json")
    assert result.exit_code == 1
    assert "error: attention: backend reference: relative error 0.5" in result.stderr
    assert result.stdout == "" and json.loads((tmp_path / "r.json").read_text())["rows"] == []


def test_models_are_loaded_once(base, monkeypatch):
    config = BenchConfig(
        parts=("generate", "prefill"), model=str(base), dtype=("float32",), backend="reference"
    )
    run = Run(config, "x")
    assert run._models() is run._models() and run._models()[0].dtype == "float32"


def test_attention_of_a_small_model(base, tmp_path):
    files = [f"--{kind}={tmp_path / f'r.{kind}'}" for kind in ("json", "csv")]
    result = _cli(
        base, "--attention", "--batch", 1, "--context", 96, "--cr", "1,2", "--repeats", 2,
        "--dtype", "float32", "--backend", "reference", "--seed", 3, *files,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["cr"] for row in found["rows"]] == [1.0, 2.0]
    keys = {
        "batch", "context", "cr", "ms", "dense_ms", "sdpa_ms", "bandwidth_fraction",
    }  # fmt: skip
    assert all(keys <= set(row) for row in found["rows"])
    assert found["command"] == (
        f"cachefold bench {base} --attention --batch 1 --context 96 --cr 1,2 --backend reference "
        "--dtype float32 --repeats 2 --seed 3"
    )
    assert "### attention" in result.stdout and "cr is imposed" in result.stdout
    assert "roofline: " in result.stderr and (tmp_path / "r.csv").stat().st_size


def test_generate_of_a_small_model(base, tmp_path):
    result = _cli(
        base, "--generate", "--batch", 1, "--context", 96, "--cr", 2, "--repeats", 1, "--steps", 1,
        "--dtype", "float32", "--backend", "reference", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    [row] = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {"tokens_per_s", "dense_tokens_per_s", "cache_bytes", "dense_cache_bytes"} <= set(row)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cr", "1,x"], "--cr takes numbers"),
        (["--cr", "0.5"], "at least 1"),
        (["--batch", "1.5"], "--batch takes whole numbers"),
        (["--dtype", "bflot16"], "Did you mean 'bfloat16'"),
        (["--backend", "numbra"], "Did you mean 'numba'"),
        (["--threads", "100000"], "is more than the"),
        (["--json", "/nowhere/r.json"], "can't be written"),
        (["--context", "64", "--cr", "8"], "choose a context of at least 145"),
        (["smollm2-135", "--generate"], "Did you mean 'smollm2-135m'"),
    ],
)
def test_bad_input_teaches(args, message):
    result = _cli(*args)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("part", ["--attention", "--generate", "--prefill"])
def test_a_ratio_out_of_reach_is_told_before_anything_is_measured(part, monkeypatch):
    monkeypatch.setattr(bench, "_run", lambda *args: pytest.fail("it began"))
    result = _cli(part, "--context", 64, "--cr", 8)
    assert result.exit_code == 2 and "choose a context of at least 145" in result.stderr


def test_all_runs_every_part(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_run", lambda config, *files: seen.append(config.parts))
    _cli("--all")
    _cli()
    _cli("--prefill", "--generate")
    assert seen == [
        ("attention", "generate", "prefill", "llama"), ("attention",), ("generate", "prefill"),
    ]  # fmt: skip


def test_generate_passes_options_on(pair, monkeypatch):
    """The backend that was asked for is the one whose cache is used."""
    config = BenchConfig(
        parts=("generate",), batch=(1,), context=(96,), cr=(2.0,), backend="torch", steps=1
    )
    decoders = generate._decoders(config, [pair], 1, 96, (2.0,), repeats=1)
    assert decoders["folded 2 float32"].cache.backend == "torch"


def test_examples_run():
    assert doctest.testmod(bench).attempted and not doctest.testmod(bench).failed
