"""`cachefold calibrate`, and `--cr` of the verbs that run a dial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachefold.models.fold import fold
from cachefold.models.hub import read_config, save_folded, update_config
from cachefold.policies import DMC
from tests.cli.conftest import Run
from tests.models.tiny import forbid_loading, scramble_decisions, tiny_model


@pytest.fixture
def dial(folder: Path, tmp_path: Path) -> Path:
    model = fold(tiny_model(eos_token_id=0, bos_token_id=None), DMC(cr=2, max_cr=8, delay=4))
    scramble_decisions(model)
    for layer in model.model.layers:
        layer.self_attn.decision.slope.data.fill_(0.3)
    base = {"id": str(folder / "base"), "revision": "local"}
    return save_folded(model, tmp_path / "dial", base=base)


def test_calibrate_writes_a_preset(cli: Run, folder: Path, dial: Path) -> None:
    files = sorted((folder / "data").iterdir())
    result = cli(
        "calibrate", dial, *files, "--preset", "code", "--tokens", 64, "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    assert "preset code" in result.output
    table = read_config(dial)["dial"]["code"]
    assert table == sorted(table) and len(table) >= 2
    result = cli("calibrate", dial, *files, "--tokens", 64, "--dtype", "float32")
    assert set(read_config(dial)["dial"]) == {"code", "bulk"}


def test_calibrate_refuses_before_it_loads(
    cli: Run, folder: Path, dial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    text = folder / "data" / "one.jsonl"
    assert "no dial to calibrate" in cli("calibrate", folder / "artefact", text).stderr
    assert "no text file at nosuch.txt" in cli("calibrate", dial, text, "nosuch.txt").stderr
    assert "text files end in" in cli("calibrate", dial, text, dial / "cachefold.json").stderr


def test_a_dial_is_asked_for_what_it_serves_before_it_loads(
    cli: Run, folder: Path, dial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    document = ("--data", folder / "data", "--document", "one.jsonl")
    for verb in (("generate", "--prompt", "w1"), ("explain", "w1"), ("demo", *document)):
        for artefact, options, message in (
            (dial, ("--cr", 20), "serves cr from 1 to 8, tokens seen / entries kept; got 20.0"),
            (dial, ("--preset", "codes"), "unknown preset 'codes'"),
            (folder / "artefact", ("--cr", 4), "cr=4.0: only a dial takes that"),
            (folder / "artefact", ("--preset", "code"), "preset=code: only a dial takes that"),
        ):
            result = cli(*verb, "--artefact", artefact, *options)
            assert result.exit_code == 2 and message in result.stderr
            assert result.stdout == ""


def test_generate_and_explain_take_a_ratio(cli: Run, dial: Path) -> None:
    prompt = " ".join(["w1 w2 w3"] * 20)
    kept = []
    for cr in (1, 8):
        options = ("--artefact", dial, "--cr", cr, "--max-new-tokens", 4, "--dtype", "float32")
        result = cli("generate", "--prompt", prompt, *options)
        assert result.exit_code == 0, result.output
        kept.append(result.output.split("cr ")[-1].split(" ")[0])
    assert kept[0] == "1.00" and float(kept[1]) > 1.5
    tables = [
        cli("explain", prompt, "--artefact", dial, "--cr", cr).output.split("\n\n")[0]
        for cr in (1, 8)
    ]
    assert "merge" not in tables[0] and "merge" in tables[1]


def test_explain_and_demo_take_a_preset_and_demo_a_ratio(
    cli: Run, folder: Path, dial: Path, tmp_path: Path
) -> None:
    # At 2 the preset stands where nothing merges, and nominally half of all tokens do.
    update_config(dial, {"dial": {"code": [[2.0, -1e3], [8.0, 1e3]]}})
    prompt = " ".join(["w1 w2 w3"] * 20)
    merged = [
        "merge" in cli("explain", prompt, "--artefact", dial, *preset).output.split("\n\n")[0]
        for preset in ((), ("--preset", "code"))
    ]
    assert merged == [True, False]
    options = ("--data", folder / "data", "--document", "one.jsonl", "--piece-tokens", 64)
    demo = ("demo", "--artefact", dial, "--tokens", 100, *options, "--out", tmp_path / "out")
    reached = []
    for dialled in (("--cr", 1), ("--cr", 8), ("--cr", 2, "--preset", "code")):
        result = cli(*demo, *dialled)
        assert result.exit_code == 0, result.output
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["target_cr"] == dialled[1]
        reached.append((summary["cr"], summary["files"][0]["cr"]))
    assert reached[0] == reached[2] == (1, 1) and min(reached[1]) > 1.5
