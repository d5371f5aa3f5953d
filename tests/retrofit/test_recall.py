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
    assert one == same and len(one) == 20
    assert one != other


def test_most_of_what_is_put_in_comes_again_at_all_distances() -> None:
    gaps: list[int] = []
    told = 0
    for text in recall_texts(PROSE, 0):
        numbers = re.findall(r"has the number (\d+)\.", text)
        told += len(set(numbers))
        for number, count in Counter(numbers).items():
            if count > 1:
                gaps.append(text.split().index(number + ".") * -1 + _last(text.split(), number))
    assert len(gaps) > 0.7 * told > 20
    assert min(gaps) < 40 and max(gaps) > 150  # words


def _last(words: list[str], number: str) -> int:
    return len(words) - 1 - words[::-1].index(number + ".")


def test_some_texts_go_round_a_few_sentences() -> None:
    distinct = [
        len(set(re.findall(r"Sentence \d+ of text \d+", text))) for text in recall_texts(PROSE, 0)
    ]
    monotonous = [count for count in distinct if count <= 6]
    assert 1 <= len(monotonous) < len(distinct) / 2
    assert all(count > 90 for count in distinct if count > 6)


def test_no_template_is_one_of_the_evaluation() -> None:
    """Five words in a row that a haystack has besides its filler are in no text made here."""
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


def test_the_share_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE[0])
    counts = {}
    for share in (0.0, 0.5, 0.75):
        data = DataConfig(files=[str(tmp_path / "a.txt")], seq_len=16, recall=share)
        counts[share] = len(load_blocks(data, make_tokenizer()))
    assert counts[0.5] > 1.7 * counts[0.0] and counts[0.75] > 3.4 * counts[0.0]


def test_a_share_takes_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w0 w1 " * 80)  # too long for one
    with pytest.raises(ValueError, match="takes text with sentences"):
        load_blocks(
            DataConfig(files=[str(tmp_path / "a.txt")], seq_len=4, recall=0.5),
            make_tokenizer(),
        )
