"""Reading, packing and shuffling of training text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from cachefold.retrofit.config import DataConfig
from cachefold.retrofit.data import PackedDataset, load_blocks, split_held_out
from tests.retrofit.tiny import make_tokenizer


def load(path: Path, **options: object) -> list[list[int]]:
    data = DataConfig(files=[str(path)], **{"seq_len": 4, **options})
    return load_blocks(data, make_tokenizer()).tolist()


def test_text_field_messages_and_plain_text_give_the_same_ids(tmp_path: Path) -> None:
    text = "user w0 assistant w1"
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "c.txt").write_text(text)
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": text}))
    with gzip.open(tmp_path / "e.txt.gz", "wt") as file:
        file.write(text)
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text}))
    expected = [[2, 4, 3, 5, 0]]
    for name in ("a.jsonl", "b.jsonl", "c.txt", "e.txt.gz", "f.jsonl.gz"):
        assert load(tmp_path / name, seq_len=5) == expected, name
    assert load(tmp_path / "d.jsonl", seq_len=5, text_field="body") == expected
    assert load(tmp_path / "c.txt", seq_len=5, text_field="body") == expected


def test_texts_are_joined_with_the_end_token_and_the_rest_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w0 w1"}\n{"text": "w2"}\n{"text": "w3 w4"}\n')
    assert load(tmp_path / "a.jsonl", seq_len=3) == [[4, 5, 0], [6, 0, 7]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "w0"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "w0"}\n[1]\n', r"a.jsonl:2: a line must be a JSON object"),
        ("a.jsonl", '{"txt": "w0"}\n', r"a.jsonl:1: no text in field 'text'.*'txt'"),
        ("a.jsonl", '{"text": 5}\n', r"a.jsonl:1: no text in field"),
        ("a.jsonl", '{"messages": 5}\n', r"a.jsonl:1: the chat template refuses"),
        ("a.jsonl", "", "the training data is empty"),
        ("a.txt", "w0 w1", "has 3 tokens, less than one sequence of 4"),
        ("a.csv", "w0", "data files end in .jsonl, .txt"),
        ("a.txt.gz", "not gzip", "can't be read"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_missing_file_and_no_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training file at"):
        load(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="names no text"):
        load_blocks(DataConfig(), make_tokenizer())


def test_order_depends_on_the_seed_alone_and_covers_everything_each_time_round() -> None:
    blocks = torch.arange(10)[:, None]

    def order(seed: int, length: int) -> list[int]:
        dataset = PackedDataset(blocks, seed=seed, length=length)
        return [dataset[i]["input_ids"].item() for i in range(len(dataset))]

    first = order(0, 25)
    assert first == order(0, 25) != order(1, 25)
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert first[:10] != first[10:20]
    assert order(0, 7) == first[:7]
    assert len(PackedDataset(blocks)) == 10


def test_held_out_sequences_are_not_trained_on() -> None:
    blocks = torch.arange(10)[:, None]
    train, held_out = split_held_out(blocks, 3)
    assert sorted([*train.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(10))
    assert len(held_out) == 3
    train, held_out = split_held_out(blocks[:1], 3)
    assert train.tolist() == held_out.tolist() == [[0]]
