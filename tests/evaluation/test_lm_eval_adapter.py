"""Our figures are those of lm-eval, and lm-eval sees compression through the adapter."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-eval) is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cachefold import DMC, fold, save_folded
from cachefold.evaluation import choice
from cachefold.evaluation.choice import Choice
from cachefold.evaluation.lm_eval_adapter import CachefoldLM, main
from cachefold.evaluation.subject import Subject
from cachefold.models.dial import turn_dial
from tests.evaluation.harness import evaluated, run
from tests.evaluation.tiny import rows_of, tiny_tokenizer
from tests.models.tiny import scramble_decisions, tiny_model

ROOT = Path(__file__).parents[2]
ROWS = rows_of(20)
OURS = Choice(name="tiny", pairs=choice._after_question, metrics=("acc", "acc_norm"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def local_task(tmp_path, **more) -> dict:
    """A task of lm-eval on a file of this machine."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "task": "tiny", "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "Question: {{query}}\nAnswer:", "doc_to_target": "gold",
        "output_type": "multiple_choice", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    } | more  # fmt: skip


def folded_model():
    model = fold(tiny_model(), DMC(delay=2))
    scramble_decisions(model)
    return model


def test_dense_figures_are_those_of_lm_eval_with_its_own_model(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    theirs, samples = evaluated(
        HFLM(model, tokenizer=tokenizer, batch_size=4), local_task(tmp_path)
    )
    ours = list(OURS.evaluate(ROWS, Subject(model, tokenizer)))
    for sample, row in zip(samples, ours, strict=True):
        logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert row["logprobs"] == pytest.approx(logprobs, abs=1e-4)
        assert (row["acc"], row["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    summary = OURS.summarise(ours)
    for metric in ("acc", "acc_norm"):
        assert theirs["results"]["tiny"][f"{metric},none"] == pytest.approx(summary[metric].value)
    assert 0 < summary["acc"].value < 1


def test_lm_eval_sees_compression_through_the_adapter(tmp_path, caplog):
    tokenizer, task = tiny_tokenizer(), local_task(tmp_path)
    with caplog.at_level(logging.WARNING):
        found, samples = evaluated(CachefoldLM(subject=Subject(folded_model(), tokenizer)), task)
    ours = list(OURS.evaluate(ROWS, Subject(folded_model(), tokenizer)))
    for sample, row in zip(samples, ours, strict=True):
        logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert row["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    _, dense = evaluated(CachefoldLM(subject=Subject(tiny_model(), tokenizer)), task)
    assert dense[0]["filtered_resps"] != samples[0]["filtered_resps"]
    assert found["config"]["cachefold"]["cr"] > 1.3 and "| cr " in caplog.text
    assert found["config"]["cachefold"]["policy"]["name"] == "dmc"


def instances(kind, arguments):
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def test_other_requests_are_answered_as_lm_eval_answers_them():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=2, max_length=32)
    ours = CachefoldLM(subject=Subject(model, tokenizer, max_length=32))
    texts = instances("loglikelihood_rolling", [("a short one",), ("words and " * 9,)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )
    empty = instances("loglikelihood", [("", "a thing"), ("what", " is it")])
    for (mine, greedy), (other, same) in zip(
        ours.loglikelihood(empty), theirs.loglikelihood(empty, disable_tqdm=True), strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-3) and greedy == same
    options = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 9}
    prompts = instances("generate_until", [("what is", options), ("a", options)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_what_the_adapter_cannot_do_is_refused(tmp_path):
    lm = CachefoldLM(subject=Subject(tiny_model(), tiny_tokenizer()))
    sampled = {"until": [], "do_sample": True, "temperature": 1.0}
    with pytest.raises(ValueError, match="greedily"):
        lm.generate_until(instances("generate_until", [("a", sampled)]))
    with pytest.raises(ValueError, match="pretrained"):
        CachefoldLM()
    with pytest.raises(ValueError, match="dtype must be"):
        CachefoldLM("smollm2-135m", dtype="int3")
    with pytest.raises(ValueError, match="none is given"):
        CachefoldLM("smollm2-135m", cr=2)
    (tmp_path / "cachefold.json").write_text("{}")
    with pytest.raises(ValueError, match="is an artefact"):
        CachefoldLM(str(tmp_path), policy="tova")


@pytest.fixture
def base(tmp_path) -> Path:
    """Folder of a dense model."""
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def saved(base: Path, policy: DMC, **tables) -> Path:
    """Folder of an artefact."""
    model = fold(tiny_model(max_position_embeddings=2048), policy)
    scramble_decisions(model)
    turn_dial(model, tables)
    return save_folded(model, base.parent / "artefact", base={"id": str(base), "revision": "local"})


def test_lm_eval_finds_the_model_by_name(tmp_path, base):
    arguments = {"pretrained": str(base), "dtype": "float32", "policy": "tova", "cr": 2}
    found = run("cachefold", local_task(tmp_path), model_args=arguments, limit=4)
    assert found["config"]["cachefold"]["cr"] == pytest.approx(2, rel=0.1)
    assert "acc_norm,none" in found["results"]["tiny"]


def test_releases_with_plugins_find_the_model_by_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [(name, target)] = project["entry-points"]["lm_eval.models"].items()
    assert EntryPoint(name, target, "lm_eval.models").load() is get_model(name) is CachefoldLM


def test_the_dial_of_an_artefact_is_set(base):
    tables = {"bulk": [(1.2, -2.0), (6.0, 2.0)], "chat": [(1.2, -1.0), (6.0, 3.0)]}
    folder = str(saved(base, DMC(cr=2, max_cr=8, delay=2), **tables))
    lm = CachefoldLM(folder, dtype="float32", cr=4, preset="chat")
    assert lm.get_model_info()["cachefold"]["policy"]["cr"] == 4
    model = lm.subject.model
    assert model._cachefold_dial.position(2.0) == model._cachefold_dial.position(2.0, "chat")
    assert CachefoldLM(folder).get_model_info()["cachefold"]["policy"]["cr"] == 2
    for asked, message in (
        ({"cr": 9}, "serves cr from 1 to 8.*got 9"),
        ({"cr": "four"}, "serves cr from 1 to 8.*got 'four'"),
        ({"preset": "chats"}, "Did you mean 'chat'"),
        ({"presets": "chat"}, "takes no presets. Did you mean 'preset'"),
        ({"policy": "dmc", "cr": 4}, "takes no policy. Where it has a dial, cr and preset"),
    ):
        with pytest.raises(ValueError, match=message):
            CachefoldLM(folder, **asked)


@pytest.mark.parametrize("asked", [{"cr": 4}, {"preset": "chat"}, {"preset": "bulk"}])
def test_an_artefact_without_a_dial_has_none_to_set(base, asked):
    folder = saved(base, DMC(cr=2, delay=2))
    with pytest.raises(ValueError, match="this model has none"):
        CachefoldLM(str(folder), **asked)


def documented(tmp_path: Path, base: Path) -> list[str]:
    """Arguments of the command on docs/evaluation.md, with its task and an artefact of here."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    [task] = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "my-piqa.yaml").write_text(task)
    [command] = re.findall(
        r"^python -m cachefold\S+lm_eval_adapter (run .*my-piqa.yaml.*)$", page, re.M
    )
    folder = saved(base, DMC(cr=2, max_cr=8, delay=2))
    command = re.sub(r"pretrained=[^, ]+", f"pretrained={folder}", command)
    return command.replace("my-piqa.yaml", str(tmp_path / "my-piqa.yaml")).split()


def test_the_command_runs_a_local_task_offline(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # What it ships takes long to index; its log would keep the captured stream.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    results = ["--output_path", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *documented(tmp_path, base), *results])
    main()
    assert "|acc_norm|" in capsys.readouterr().out
    [path] = tmp_path.glob("results*.json")
    written = json.loads(path.read_text())
    assert written["config"]["cachefold"]["policy"]["cr"] == 4
    assert written["n-samples"]["my-piqa"]["original"] == 1200


@pytest.mark.slow
def test_the_module_is_the_command(tmp_path, base):
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "cachefold.evaluation.lm_eval_adapter", *documented(tmp_path, base)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "|acc_norm|" in ran.stdout and "| cr " in ran.stderr
