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


def test_calibrate_writes_a_preset(
    cli: Run, folder: Path, dial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((folder / "data").iterdir())
    options = ("--tokens", 64, "--dtype", "float32")
    result = cli("calibrate", dial, *files, "--preset", "code", *options)
    assert result.exit_code == 0, result.output
    assert "preset code" in result.output
    table = read_config(dial)["dial"]["code"]
    assert table == sorted(table) and len(table) >= 2
    # As a run advises whose dial could not be calibrated: `bulk` is missing.
    monkeypatch.chdir(dial)
    result = cli("calibrate", ".", *files, *options)
    assert f"written to {dial.resolve()}\n" in result.output
    assert set(read_config(dial)["dial"]) == {"code", "bulk"}


@pytest.mark.parametrize(("name", "words"), [("bulk", ()), ("code", ("--preset", "code"))])
def test_a_preset_is_replaced_only_when_asked(
    cli: Run, folder: Path, dial: Path, name: str, words: tuple[str, ...]
) -> None:
    old = {"bulk": [[2.0, 0.0], [4.0, 1.0]], "code": [[2.0, 0.5], [4.0, 1.5]]}
    update_config(dial, {"dial": old})
    command = ("calibrate", dial, folder / "data" / "one.jsonl", *words, "--tokens", 64)
    command = (*command, "--dtype", "float32")
    with pytest.MonkeyPatch.context() as patch:
        forbid_loading(patch)
        result = cli(*command)
    assert result.exit_code == 2 and result.stdout == ""
    assert f"has a preset {name!r} already (presets there: bulk, code)" in result.stderr
    assert "--preset NAME" in result.stderr and "--replace" in result.stderr
    assert read_config(dial)["dial"] == old
    result = cli(*command, "--replace")
    assert result.exit_code == 0, result.output
    new = read_config(dial)["dial"]
    assert new.pop(name) != old.pop(name) and new == old


def test_calibrate_refuses_before_it_loads(
    cli: Run, folder: Path, dial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    text = folder / "data" / "one.jsonl"
    assert "no dial to calibrate" in cli("calibrate", folder / "artefact", text).stderr
    for empty in ("", " "):
        assert "needs a name" in cli("calibrate", dial, text, "--preset", empty).stderr
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
