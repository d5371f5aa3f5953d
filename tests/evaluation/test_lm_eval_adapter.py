"""Our figures are those of lm-eval, and lm-eval sees compression through the adapter."""

from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-eval) is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cachefold import DMC, fold
from cachefold.evaluation import choice
from cachefold.evaluation.choice import Choice
from cachefold.evaluation.lm_eval_adapter import CachefoldLM
from cachefold.evaluation.subject import Subject
from tests.evaluation.tiny import rows_of, tiny_tokenizer
from tests.models.tiny import scramble_decisions, tiny_model

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


def run(model, task, **options) -> dict:
    """As lm-eval's command, without the tasks it ships, which take long to index."""
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
        log_samples=True, **options,
    )  # fmt: skip


def evaluated(model, task) -> tuple[dict, list[dict]]:
    """Results of lm-eval, and its samples in order."""
    found = run(model, task)
    return found, sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])


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


def test_lm_eval_finds_the_model_by_name(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = {
        "pretrained": str(tmp_path / "model"),
        "dtype": "float32",
        "policy": "tova",
        "cr": 2,
    }
    found = run("cachefold", local_task(tmp_path), model_args=arguments, limit=4)
    assert found["config"]["cachefold"]["cr"] == pytest.approx(2, rel=0.1)
    assert "acc_norm,none" in found["results"]["tiny"]
