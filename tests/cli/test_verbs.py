"""generate, explain, demo, ls, env."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

from cachefold.cli import _places, demo, explain, generate
from cachefold.cli._artefact import SHIPPED, load, open_artefact
from cachefold.fingerprint import fingerprint
from cachefold.models.fold import fold, new_cache
from cachefold.models.hub import read_config, save_folded, update_config
from cachefold.policies import DMC, DMS, GQA
from tests.cli.conftest import Run, words
from tests.models.tiny import forbid_loading, scramble_decisions, tiny_model

ROOT = Path(__file__).parents[2]
FOOTER = re.compile(
    r"seen ([\d,]+) \| kept ([\d,]+) \| cr ([\d.]+) \| cache [\d.]+ MiB \(dense [\d.]+ MiB\)"
    r" \| [\d.]+ tok/s$"
)


def test_generate_streams_and_counts(cli: Run, folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(words(90))
    args = (
        "generate",
        "--artefact",
        folder / "artefact",
        "--prompt-file",
        prompt,
        "--max-new-tokens",
        8,
    )
    result = cli(*args, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    seen, kept, ratio = FOOTER.search(result.stdout.strip()).groups()
    assert 90 <= int(seen) <= 97
    assert int(kept) == round(int(seen) / float(ratio)) < int(seen)
    assert cli(*args, "--dtype", "float32").stdout.split("seen")[0] in result.stdout


def test_generate_chat_and_seed(cli: Run, folder: Path) -> None:
    args = (
        "generate",
        "--artefact",
        folder / "artefact",
        "--prompt",
        "w1 w2",
        "--chat",
        "--temperature",
        1.0,
    )
    texts = [cli(*args, "--seed", seed).stdout.split("seen")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--prompt TEXT or --prompt-file"),
        (["--prompt", " "], "empty"),
        (["--prompt-file", "/nowhere/x"], "can't read --prompt-file"),
        (["--prompt", "w1", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["--prompt", "w1", "--dtype", "int8"], "--dtype must be one of"),
    ],
)
def test_generate_refuses(
    cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    forbid_loading(monkeypatch)
    result = cli("generate", "--artefact", folder / "artefact", *args)
    assert result.exit_code == 2 and message in result.stderr


def test_generate_without_an_artefact_takes_any_ratio(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(words(500))
    args = ("generate", "--prompt-file", tmp_path / "text", "--max-new-tokens", 1, "--cr")
    results = {cr: cli(*args, cr) for cr in (4, 8)}
    assert results[4].exit_code == results[8].exit_code == 0, results
    (_, _, four), (_, _, eight) = (
        FOOTER.search(results[cr].stdout.strip()).groups() for cr in (4, 8)
    )
    assert float(eight) > 1.3 * float(four) > 2.6


def test_what_is_shipped_is_a_dial_on_every_verb() -> None:
    assert read_config(ROOT / SHIPPED)["policy"]["max_cr"] == 12
    for verb in (demo, explain, generate):
        assert inspect.signature(verb.run).parameters["artefact"].default == SHIPPED


def test_a_ratio_that_a_short_text_misses_is_explained(cli: Run, folder: Path) -> None:
    args = ("generate", "--artefact", folder / "artefact", "--max-new-tokens", 1, "--prompt")
    note = "note: the newest 4 tokens stay exact, so that 3 tokens are too few for the ratio of 2"
    assert note in cli(*args, words(3)).stderr
    assert "note" not in cli(*args, words(90)).stderr


def test_a_ratio_for_a_model_without_a_dial_is_refused(cli: Run, folder: Path) -> None:
    error = cli("generate", "--artefact", folder / "artefact", "--prompt", "w1", "--cr", 4).stderr
    assert "cr=4.0: only a dial takes that, and this model has none; it serves cr=2 alone." in error
    assert "preset" not in error


@pytest.mark.parametrize(
    ("made", "warned"), [("local", False), ("local:{}", False), ("local:0", True), ("main", True)]
)
def test_an_artefact_of_another_base_warns(folder, tmp_path, capsys, made, warned) -> None:
    place = tmp_path / "artefact"
    shutil.copytree(folder / "artefact", place)
    revision = made.format(fingerprint(folder / "base"))
    update_config(place, {"base": {"id": str(folder / "base"), "revision": revision}})
    load(open_artefact(place, "float32"))
    error = capsys.readouterr().err
    assert ("warning: the artefact was made on" in error) == warned
    assert ("local:" in error) == warned


def test_explain_agrees_with_the_cache(cli: Run, folder: Path) -> None:
    text = words(30, seed=4)
    result = cli(
        "explain",
        "--artefact",
        folder / "artefact",
        text,
        "--layer",
        1,
        "--head",
        1,
        "--dtype",
        "float32",
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n\n")[0].splitlines()
    rows = [re.split(r"\s{2,}", line) for line in lines[1:]]
    assert len(rows) == 30 and rows[0][1] == text.split()[0]
    assert rows[0][4] == "append" and {row[4] for row in rows} == {"append", "merge"}
    assert rows[3][5] == "after #7" and rows[-1][5] == "not yet"
    loaded = load(open_artefact(folder / "artefact", "float32"))
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    cache = new_cache(loaded.model)
    for i, row in enumerate(rows):
        loaded.model(ids[:, i : i + 1], past_key_values=cache)
        assert int(row[9]) == cache.entries()[1][0, 1]
        assert int(row[9]) == sum(int(cell) for cell in row[6:9])


def test_explain_says_of_what_drops_that_it_drops(cli: Run, folder: Path, tmp_path: Path) -> None:
    model = fold(tiny_model(eos_token_id=0, bos_token_id=None), DMS(delay=4))
    scramble_decisions(model)
    base = {"id": str(folder / "base"), "revision": "local"}
    save_folded(model, tmp_path / "dms", base=base)
    text = words(30, seed=4)
    result = cli("explain", "--artefact", tmp_path / "dms", text, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    table, legend = result.stdout.split("\n\n")
    assert not re.search("merge|open|omega", result.stdout) and "wish to drop" in legend
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[1:]]
    dropped = [row[3] for row in rows if row[3] != "append"]
    assert 0 < len(dropped) < 29
    assert dropped == [f"drop #{int(row[0]) - 1}" for row in rows if row[3] != "append"]
    loaded = load(open_artefact(tmp_path / "dms", "float32"))
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    cache = new_cache(loaded.model)
    for i, row in enumerate(rows):
        loaded.model(ids[:, i : i + 1], past_key_values=cache)
        settled, ring, kept = map(int, row[5:])
        assert settled + ring == kept == cache.entries()[0][0, 0]


def test_explain_refuses_what_decides_nothing(
    cli: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"id": str(folder / "base"), "revision": "local"}
    save_folded(fold(tiny_model(), GQA(kv_heads=1)), tmp_path / "gqa", base=base)
    forbid_loading(monkeypatch)
    result = cli("explain", "w1", "--artefact", tmp_path / "gqa")
    assert result.exit_code == 2 and "policy gqa, which decides nothing" in result.stderr


def test_explain_refuses(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    args = ("explain", "--artefact", folder / "artefact")
    assert "folded layers: 0..1" in cli(*args, "w1", "--layer", 2, "--head", 0).stderr
    for head in (-1, 2):
        assert "--head must be 0..1" in cli(*args, "w1", "--layer", 0, "--head", head).stderr
    assert "the text is empty" in cli(*args, " ").stderr


def test_explain_knows_pooled_heads_and_layers_that_stay_dense(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("Gemma3Text")
    model.save_pretrained(tmp_path / "base")
    base = {"id": str(tmp_path / "base"), "revision": "local"}
    save_folded(fold(model, DMC(delay=4, kv_heads=1)), tmp_path / "pooled", base=base)
    forbid_loading(monkeypatch)
    args = ("explain", "w1", "--artefact", tmp_path / "pooled")
    assert "--layer 0 does not fold; folded layers: 1..1" in cli(*args).stderr
    assert "--head must be 0..0, got 1" in cli(*args, "--layer", 1, "--head", 1).stderr


def test_demo_writes_a_summary(cli: Run, folder: Path, tmp_path: Path) -> None:
    result = cli(
        "demo", "--artefact", folder / "artefact", "--out", tmp_path / "out", "--tokens", 100,
        "--data", folder / "data", "--document", "one.jsonl", "--piece-tokens", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"loading {folder / 'artefact'}\n")
    assert "compression map" in result.stdout and "mean" in result.stdout
    assert "64-token pieces, cr 2 asked for:" in result.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["target_cr"] == 2 and summary["tokens_seen"] == (100 + 59) * 2 * 2
    assert summary["cr"] == pytest.approx(summary["tokens_seen"] / summary["entries_kept"])
    assert summary["folded_cache_bytes"] < summary["dense_cache_bytes"]
    assert summary["dense_loss"] > 0 and summary["folded_loss"] > 0
    assert [file["name"] for file in summary["files"]] == ["one", "two"]


def test_ls(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "smollm2-135m" in cli("ls", "models").stdout
    assert "dmc" in cli("ls", "policies").stdout
    assert "passkey@4096" in cli("ls", "tasks").stdout
    backends = cli("ls", "backends").stdout.splitlines()
    assert [line.split()[0] for line in backends] == ["numba", "triton", "torch", "reference"]
    assert backends[-1] == "reference  yes"
    assert "Did you mean 'policies'?" in cli("ls", "polices").stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_places, "REPOSITORY", tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/a.yaml").write_text("# Half the cache.\nmodel: x\n")
    (tmp_path / "recipes/b.yaml").write_text("# In 1.5 hours, as\n# before. Not\n# shipped.\n")
    (tmp_path / "recipes/c.yaml").write_text("model: x\n# Not at the head.\n")
    assert cli("ls", "recipes").stdout.splitlines() == [
        "recipes/a.yaml  Half the cache.", "recipes/b.yaml  In 1.5 hours, as before.",
        "recipes/c.yaml",
    ]  # fmt: skip
    artefact = tmp_path / "runs/x/final"
    artefact.mkdir(parents=True)
    config = {"base": {"id": "b"}, "policy": {"name": "dmc", "cr": 2.0}, "cr": 2.0613}
    (artefact / "cachefold.json").write_text(json.dumps(config))
    (artefact.parents[1] / "y").mkdir()
    config = {"base": {"id": "b"}, "policy": {"name": "dmc", "cr": 4, "max_cr": 12}, "cr": 3.96}
    (artefact.parents[1] / "y/cachefold.json").write_text(json.dumps(config))
    (artefact.parents[1] / "z").mkdir()
    config = {"base": {"id": "b"}, "policy": {"name": "gqa", "kv_heads": 1}, "cr": 3.0}
    (artefact.parents[1] / "z/cachefold.json").write_text(json.dumps(config))
    (tmp_path / "artefacts/bad").mkdir(parents=True)
    (tmp_path / "artefacts/bad/cachefold.json").write_text("{")
    lines = cli("ls", "artefacts").stdout.splitlines()
    assert "can't be read" in lines[0]
    assert lines[1] == "runs/x/final   b, dmc cr 2.0, measured 2.06"
    assert lines[2] == "runs/y         b, dmc dial 1 to 12, set to 4, measured 3.96"
    assert lines[3] == "runs/z         b, gqa, measured 3.00"


def test_env(cli: Run) -> None:
    lines = cli("env").stdout.splitlines()
    assert {"cachefold", "torch", "threads", "backends"} <= {line.split()[0] for line in lines}
