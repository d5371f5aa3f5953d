"""What a recipe's data section gives: sequences, held-out ones, their order."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cachefold.retrofit.config import DataConfig
from cachefold.retrofit.data import PackedDataset, load_blocks, split_held_out
from tests.retrofit.tiny import make_tokenizer


def load(**options: Any) -> list[list[int]]:
    return load_blocks(DataConfig(**{"seq_len": 4, **options}), make_tokenizer()).tolist()


def test_files_are_packed_to_seq_len(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "w0 w1"}\n{"body": "w2 w3"}\n')
    assert load(files=[str(tmp_path / "a.jsonl")], text_field="body") == [[4, 5, 0, 6]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": \n', r"training data: .*a.jsonl:1: not valid JSON.*; check data.files"),
        ('{"txt": "w0"}\n', "no text in field 'text'.*; set data.text_field"),
        ('{"text": ""}\n', "training data: the text is empty; check data.files and"),
        ('{"text": "w0"}\n', "2 tokens, less than one sequence of 4; add text or lower data.seq_l"),
    ],
)
def test_errors_name_the_key_of_the_recipe(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(files=[str(tmp_path / "a.jsonl")])


def test_no_source() -> None:
    with pytest.raises(ValueError, match="names no text"):
        load()


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[Any]:
    """A module `datasets` with these rows; returns the calls it gets."""
    calls: list[Any] = []
    module: Any = ModuleType("datasets")

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "w2"}]
    calls = fake_datasets(monkeypatch, [{"text": "w0"}, {"text": ""}, {"messages": messages}])
    assert load(dataset="owner/set", split="test", seq_len=5) == [[4, 0, 2, 6, 0]]
    assert calls == [(("owner/set",), {"split": "test"})]


def test_row_of_a_dataset_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"text": "w0"}, {"body": "w1"}])
    with pytest.raises(ValueError, match=r"owner/set\[1\]: no text in field 'text'.*'body'"):
        load(dataset="owner/set")


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load(dataset="owner/set")


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
