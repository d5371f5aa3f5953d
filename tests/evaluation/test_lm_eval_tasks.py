"""Our tasks are those that lm-eval ships: the same prompts, answers, metrics and figures.

Its own task files make the prompts, from rows of ours turned back into rows of its data sets. What
our rows have lost can't be checked:

- hellaswag: rows are cleaned of `[title]` and the like as its `process_docs` does, and `ctx_a` and
  `ctx_b` are joined. `ctx_b` is the sentence that breaks off, as the README of the set says.
- boolq: its passages are those of SuperGLUE and begin with `Title -- `. Ours have no title.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` (lm-eval) is not installed")

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from cachefold.evaluation import choice
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import get_task, read_rows
from tests.evaluation.harness import evaluated
from tests.evaluation.tiny import byte_tokenizer
from tests.models.tiny import tiny_model

Row = dict[str, Any]
SHIPPED = Path(lm_eval.tasks.__file__).parent
LETTERS = "ABCDE"


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": row["query"], "sol1": first, "sol2": second, "label": row["gold"]}


def _arc(row: Row) -> Row:
    choices = {"text": row["choices"], "label": list(LETTERS[: len(row["choices"])])}
    return {"question": row["query"], "choices": choices, "answerKey": LETTERS[row["gold"]]}


def _openbookqa(row: Row) -> Row:
    doc = _arc(row)
    return {"question_stem": doc.pop("question"), **doc}


def _boolq(row: Row) -> Row:
    question = row["query"].removesuffix("?")
    return {"passage": row["context"], "question": question, "label": row["gold"]}


def _hellaswag(row: Row) -> Row:
    label, scene = row["query"].split(": ", 1)
    broken_off = re.fullmatch(r"(.*[.!?]\S*) ([^.!?]+)", scene)
    start, rest = broken_off.groups() if broken_off else (scene, "")
    return {
        "activity_label": label, "ctx_a": start, "ctx_b": rest, "endings": row["choices"],
        "label": str(row["gold"]),
    }  # fmt: skip


def _winogrande(row: Row) -> Row:
    first, second = row["choices"]
    answer = str(row["gold"] + 1)
    return {"sentence": row["query"], "option1": first, "option2": second, "answer": answer}


def _mmlu(row: Row) -> Row:
    return {"question": row["query"], "choices": row["choices"], "answer": row["gold"]}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['target']}"}


CASES = {
    "piqa": ("piqa/piqa.yaml", _piqa),
    "arc_easy": ("arc/arc_easy.yaml", _arc),
    "arc_challenge": ("arc/arc_challenge.yaml", _arc),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag),
    "openbookqa": ("openbookqa/openbookqa.yaml", _openbookqa),
    "boolq": ("super_glue/boolq/default.yaml", _boolq),
    "winogrande": ("winogrande/default.yaml", _winogrande),
    "lambada": ("lambada/lambada_openai.yaml", _lambada),
    "mmlu": ("mmlu/default/mmlu_{subject}.yaml", _mmlu),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def shipped_task(name: str, rows: list[Row]) -> Row:
    """A task of lm-eval as its file describes it, on rows of ours instead of those of the hub."""
    file, as_doc = CASES[name]
    config = load_yaml(SHIPPED / file.format(subject=rows[0].get("subject")))
    splits = ("training_split", "validation_split", "test_split")
    docs = {config[split]: [as_doc(row) for row in rows] for split in splits if config.get(split)}
    if name == "mmlu":
        solved = read_rows("eval/mmlu_dev.jsonl.gz", ("subject",))
        docs["dev"] = [as_doc(row) for row in solved if row["subject"] == rows[0]["subject"]]
    data = DatasetDict({split: Dataset.from_list(found) for split, found in docs.items()})
    return config | {"custom_dataset": lambda **_: data}


def rows_of(name: str) -> list[Row]:
    """A few rows; those of MMLU are of one subject, as lm-eval has a task for each."""
    rows = get_task(name).rows(None if name == "mmlu" else 8)
    return [row for row in rows if row.get("subject") == rows[0].get("subject")][:8]


def asked(name: str, row: Row) -> choice.Pairs:
    """What we score of a row."""
    task = get_task(name)
    return task.pairs(row) if isinstance(task, choice.Choice) else choice._last_word(row)


def outcome(result: Row) -> Row:
    """What we found for a row, as lm-eval calls it."""
    logprobs = result.get("logprobs") or [-result["nats"]]
    return {metric: result[metric] for metric in ("acc", "acc_norm") if metric in result} | {
        "logprobs": pytest.approx(logprobs, rel=1e-4)
    }


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_figures_are_those_of_the_task_that_lm_eval_ships(name):
    task, rows, tokenizer = get_task(name), rows_of(name), byte_tokenizer()
    model = tiny_model(vocab_size=260, max_position_embeddings=8192)
    theirs, samples = evaluated(
        HFLM(model, tokenizer=tokenizer, batch_size=2), shipped_task(name, rows),
        num_fewshot=5 if name == "mmlu" else 0,
    )  # fmt: skip
    ours = list(task.evaluate(rows, Subject(model, tokenizer)))
    for row, sample, mine in zip(rows, samples, ours, strict=True):
        assert [tuple(pair) for pair in sample["arguments"]] == asked(name, row)
        found = {metric: sample[metric] for metric in ("acc", "acc_norm") if metric in sample}
        logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert found | {"logprobs": logprobs} == outcome(mine)
    [figures] = theirs["results"].values()
    for metric, estimate in task.summarise(ours).items():
        assert figures[f"{metric},none"] == pytest.approx(estimate.value, rel=1e-3)


def test_every_subject_of_mmlu_is_introduced_as_by_lm_eval():
    rows = get_task("mmlu").rows(57)
    assert len({row["subject"] for row in rows}) == 57
    for row in rows:
        task = ConfigurableTask(config=shipped_task("mmlu", [row]))
        doc = task.eval_docs[0]
        requests = task.construct_requests(doc, task.fewshot_context(doc, 5))
        assert [tuple(request.arguments) for request in requests] == asked("mmlu", row)
