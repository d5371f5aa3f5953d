"""Prompts and judgements of multiple choice and LAMBADA."""

from __future__ import annotations

import gzip
import math

import pytest

from cachefold.evaluation import choice
from cachefold.evaluation.choice import Choice, LastWord
from cachefold.evaluation.subject import Scored, Subject
from cachefold.evaluation.task import get_task
from tests.evaluation.tiny import rows_of, tiny_tokenizer
from tests.models.tiny import tiny_model


class Fixed:
    """Knows the logprob of every continuation."""

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def encode_pair(self, context, continuation):
        return context, continuation

    def score(self, requests):
        return [
            Scored(self.logprobs[text], self.logprobs[text] > -2, len(text)) for _, text in requests
        ]


def question(gold=0):
    return {"id": "q", "query": "Why?", "choices": ["so", "because of it"], "gold": gold}


@pytest.mark.parametrize(("gold", "acc", "acc_norm"), [(0, 1.0, 0.0), (1, 0.0, 1.0)])
def test_acc_takes_the_sum_and_acc_norm_the_mean_per_character(gold, acc, acc_norm):
    subject = Fixed({" so": -3.0, " because of it": -6.5})
    [found] = get_task("piqa").evaluate([question(gold)], subject)
    assert (found["acc"], found["acc_norm"]) == (acc, acc_norm)
    assert found["id"] == "q" and found["logprobs"] == [-3.0, -6.5]


def test_the_prompts_are_those_of_lm_eval():
    asked = {name: get_task(name).pairs(get_task(name).rows(1)[0]) for name in (
        "arc_easy", "boolq", "hellaswag", "winogrande", "mmlu", "openbookqa",
    )}  # fmt: skip
    context, first = asked["arc_easy"][0]
    assert context.startswith("Question: Clara says") and context.endswith("?\nAnswer:")
    assert first == " The schoolyard has few trees."
    assert (
        "\nQuestion: does maple syrup come straight from the tree?\nAnswer:" in asked["boolq"][0][0]
    )
    assert [pair[1] for pair in asked["boolq"]] == [" no", " yes"]
    assert asked["hellaswag"][0][0].endswith(" opponent team player. After the blue team")
    assert asked["winogrande"] == [
        (f"Sarah had to call in an expert unlike Erin because {name}",
         " had vast knowledge on the subject.") for name in ("Sarah", "Erin")
    ]  # fmt: skip
    prompt = asked["mmlu"][0][0]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\n"
        "Answer: B\n\n"
    )
    assert prompt.count("\nAnswer:") == 6 and prompt.endswith("\nD. Z\nAnswer:")
    assert [pair[1] for pair in asked["mmlu"]] == [" A", " B", " C", " D"]


def test_only_a_sentence_that_breaks_off_gets_a_capital():
    for query, context in (
        ('Cars: "Stop!" he says. the man in red', 'Cars: "Stop!" he says. The man in red'),
        ("Cars: How to stop. Look at the road. It (the road) is wet.", None),
    ):
        [(asked, _)] = get_task("hellaswag").pairs({"query": query, "choices": ["stops."]})
        assert asked == (context or query)


def test_mmlu_takes_subjects_in_turn():
    rows = get_task("mmlu").rows(114)
    assert len({row["subject"] for row in rows[:57]}) == 57
    assert [row["subject"] for row in rows[57:]] == [row["subject"] for row in rows[:57]]
    assert len(get_task("mmlu").rows(None)) == 2000


def test_lambada_matches_greedily_and_gives_the_perplexity_of_words():
    task = LastWord()
    rows = [{"id": word, "context": "It was", "target": word} for word in ("a", "b")]
    found = list(task.evaluate(rows, Fixed({" a": -1.0, " b": -3.0})))
    assert [row["acc"] for row in found] == [1.0, 0.0]
    summary = task.summarise(found)
    assert list(summary) == ["acc", "perplexity"]
    assert summary["perplexity"].value == pytest.approx(math.exp(2.0))
    assert summary["perplexity"].error == pytest.approx(math.exp(2.0) * 1.0)


def test_blocks_change_nothing(monkeypatch):
    task, subject = Choice(name="tiny", pairs=choice._after_question), None
    subject = Subject(tiny_model(), tiny_tokenizer())
    whole = list(task.evaluate(rows_of(9), subject))
    monkeypatch.setattr(choice, "BLOCK", 2)
    pieces = list(task.evaluate(rows_of(9), subject))
    for one, other in zip(whole, pieces, strict=True):
        assert one["id"] == other["id"] and one["logprobs"] == pytest.approx(other["logprobs"])


@pytest.mark.parametrize(
    ("choices", "gold", "message"),
    [
        ('["b", "c"]', "2", "gold must be the index of a choice, 0 to 1, got 2"),
        ('["b", "c"]', "-1", "gold .* got -1"),
        ('["b", "c"]', '"1"', "gold .* got '1'"),
        ('["b", "c"]', "1.0", "gold .* got 1.0"),
        ('["b", "c"]', "true", "gold .* got True"),
        ("5", "0", "choices must be a list of texts, none of them empty, got 5"),
        ("null", "0", "choices .* got None"),
        ("[]", "0", "choices .* got \\[\\]"),
        ('["b", ""]', "0", "choices .* got \\['b', ''\\]"),
        ('["b", 7]', "0", "choices .* got \\['b', 7\\]"),
    ],
)
@pytest.mark.parametrize(("name", "file"), [("piqa", "piqa"), ("mmlu", "mmlu_test")])
def test_a_broken_row_names_file_and_line(
    name, file, choices, gold, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "eval").mkdir(parents=True)
    row = '{"id": "a", "subject": "s", "query": "x", "choices": %s, "gold": %s}\n'
    lines = row % ('["b", "c"]', "1") + row % (choices, gold)
    (tmp_path / "data" / "eval" / f"{file}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(ValueError, match=rf"{file}.jsonl.gz:2: {message}"):
        get_task(name).rows(None)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low", "high"), [("piqa", 0.55, 0.75), ("arc_easy", 0.35, 0.62)])
def test_a_real_model_is_as_good_as_it_is_known_to_be(name, low, high):
    from cachefold.zoo import load_base

    task = get_task(name)
    model, tokenizer = load_base("smollm2-135m")
    subject = Subject(model, tokenizer)
    found = task.summarise(list(task.evaluate(task.rows(100), subject)))
    assert low < found["acc"].value < high
    assert subject.footprint.cr == 1
