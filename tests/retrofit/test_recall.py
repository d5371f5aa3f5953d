"""Text made for recall: things come again, and none of it is a task of the evaluation."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from cachefold.evaluation.haystack import KINDS, make_haystack
from cachefold.retrofit.config import DataConfig
from cachefold.retrofit.data import load_blocks
from cachefold.retrofit.recall import recall_text, recall_texts
from tests.retrofit.tiny import make_tokenizer

PROSE = [" ".join(f"Sentence {i} of text {j} says little." for i in range(100)) for j in range(20)]


def test_seeds_alone_decide() -> None:
    one, same, other = (list(recall_texts(PROSE, seed)) for seed in (1, 1, 2))
    assert one == same and len(one) >= len(PROSE)
    assert one != other


def test_what_is_put_in_comes_again_at_all_distances() -> None:
    gaps: list[int] = []
    told = 0
    for text in recall_texts(PROSE * 3, 0):
        words = text.split()
        numbers = set(re.findall(r"\b[A-Z]+-\d+\b", text))
        told += len(numbers)
        for number in numbers:
            places = [place for place, word in enumerate(words) if number in word]
            assert len(places) > 1
            gaps += [b - a for a, b in itertools.pairwise(places)]
    assert len(gaps) > told > 20
    assert min(gaps) < 10 and max(gaps) > 400


def test_many_texts_go_round_a_few_sentences_and_some_have_hardly_a_fact() -> None:
    kinds = Counter[str]()
    for text in recall_texts(PROSE * 3, 0):
        distinct = len(set(re.findall(r"Sentence \d+ of text \d+", text)))
        kinds["plain" if distinct == 0 else "few" if distinct <= 5 else "all"] += 1
        kinds["questions"] += len(set(re.findall(r"[^.?]*\?", text))) > 3
        kinds["one question"] += len(set(re.findall(r"[^.?]*\?", text))) == 1
    assert min(kinds.values()) >= 3 and len(kinds) == 5


def test_a_subject_does_not_say_what_sort_of_answer_it_has() -> None:
    """Else a model need not look it up."""
    sorts: dict[str, Counter[str]] = {}
    for text in itertools.islice(itertools.chain(*(recall_texts(PROSE, s) for s in range(9))), 400):
        for kind, value in re.findall(r"What is the (\w+)\? The \w+ is ([^.]*)", text):
            first = "number" if value[0].isdigit() else "a" if value[:2] in ("a ", "th") else "word"
            sorts.setdefault(kind, Counter())[first] += 1
    often = [count for count in sorts.values() if count.total() >= 20]
    assert len(often) > 5
    assert all(max(count.values()) < 0.9 * count.total() for count in often)


def test_a_subject_has_one_answer_in_a_text_and_none_of_its_own_words() -> None:
    seen = 0
    for text in itertools.islice(itertools.chain(*(recall_texts(PROSE, s) for s in range(5))), 200):
        answers: dict[str, set[str]] = {}
        for subject, value in re.findall(r"What is the ([^?]+)\? The [^.]*? is ([^.]*)\.", text):
            answers.setdefault(subject, set()).add(value)
            assert not {*subject.split()} & {*value.split()} - {"the"}, (subject, value)
            seen += 1
        assert all(len(values) == 1 for values in answers.values()), text
    assert seen > 200


def test_most_texts_fit_into_a_sequence() -> None:
    """Of 3 to 4 characters a token."""
    for seq_len in (512, 1024, 2048):
        lengths = sorted(len(text) for text in recall_texts(PROSE * 2, 0, seq_len))
        assert lengths[len(lengths) // 2] < 4.5 * seq_len, seq_len
        assert lengths[-1] > 3 * seq_len


def test_no_template_is_one_of_the_evaluation() -> None:
    """Five words in a row of a haystack are in no text made here."""
    made = " ".join(itertools.islice(recall_texts(PROSE, 3), 20))
    for kind in KINDS:
        prompts = [
            make_haystack(kind, 600, depth=0.5, seed=seed, count_tokens=lambda t: len(t.split()))
            for seed in (1, 2)
        ]
        for prompt in prompts:
            words = prompt.prompt.split()
            runs = {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}
            assert not [run for run in runs if run in made], kind


def test_one_sentence_is_enough() -> None:
    assert "Only this one" in recall_text(["Only this one."], random.Random(0))


@pytest.mark.parametrize("field", ["text", "body"])  # a .txt file has no fields to name
def test_the_share_of_a_recipe(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.txt").write_text(PROSE[0])
    counts = {}
    for share in (0.0, 0.5, 0.75):
        data = DataConfig(
            files=[str(tmp_path / "a.txt")], seq_len=16, recall=share, text_field=field
        )
        counts[share] = len(load_blocks(data, make_tokenizer()))
    assert counts[0.5] > 1.7 * counts[0.0] and counts[0.75] > 3.4 * counts[0.0]


def test_a_share_takes_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w0 w1 " * 80)  # too long for one
    with pytest.raises(ValueError, match="takes text with sentences"):
        load_blocks(
            DataConfig(files=[str(tmp_path / "a.txt")], seq_len=4, recall=0.5),
            make_tokenizer(),
        )


def test_a_missing_file_is_told_as_without_recall(tmp_path: Path) -> None:
    for share in (0.0, 0.5):
        data = DataConfig(files=[str(tmp_path / "none.txt")], seq_len=4, recall=share)
        with pytest.raises(ValueError, match="^training data: .*check data.files"):
            load_blocks(data, make_tokenizer())
