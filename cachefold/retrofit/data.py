"""Training data of a recipe: its text as sequences, held-out ones apart, shuffled by seed."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cachefold.core.dial import DEFAULT_PRESET
from cachefold.retrofit.config import DataConfig
from cachefold.retrofit.recall import recall_texts
from cachefold.text import Row, TextError, check_file, evenly_spaced, pack_rows, read_file

_ADVICE = {
    "files": "check data.files",
    "field": "set data.text_field",
    "empty": "check data.files and data.text_field",
    "length": "add text or lower data.seq_len",
}


PRESETS = ("chat", "code")
"""Kinds of text that a dial is calibrated for on their own."""
CALIBRATION_TOKENS, CALIBRATION_TEXTS = 1024, 6
"""Tokens of a text at which a dial's ratio is meant, and texts of each preset."""


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Sequences in an order that depends on the seed alone; goes around when there are too few."""

    def __init__(self, blocks: Tensor, *, seed: int = 0, length: int | None = None) -> None:
        """Keeps the sequences.

        Args:
            blocks: (M, seq_len) int64 token ids.
            seed: of the order; every time around has another order.
            length: sequences to hand out; M when None.
        """
        self.blocks = blocks
        total = len(blocks) if length is None else length
        order: list[Tensor] = []
        for epoch in range(-(-total // len(blocks))):
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order.append(torch.randperm(len(blocks), generator=generator))
        self.order = torch.cat(order)[:total]

    def __len__(self) -> int:
        """Sequences handed out."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` (seq_len,) int64."""
        return {"input_ids": self.blocks[self.order[index]]}


def check_text(data: DataConfig) -> None:
    """Refuses a recipe whose text can't be there, without reading any.

    Raises:
        ValueError: it names none, a file is missing or of another type, or the `datasets` library
            is needed and missing.
    """
    if data.dataset:
        try:
            importlib.import_module("datasets")
        except ImportError as error:
            raise ValueError(
                f"data.dataset {data.dataset!r} needs the datasets library: pip install datasets"
            ) from error
    elif not data.files:
        raise ValueError("the recipe names no text: set data.files, or data.dataset")
    for file in data.files:
        try:
            check_file(file)
        except TextError as error:
            raise ValueError(f"training data: {error}; {_ADVICE[error.about]}") from error


def load_blocks(data: DataConfig, tokenizer: Any) -> Tensor:
    """Reads and packs the text a recipe names.

    Args:
        data: where the text is.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        (M, seq_len) int64, in the order of the files; those made for recall come last.

    Raises:
        ValueError: missing file, broken line, missing field, or not enough text.
    """
    try:
        rows: Iterable[Row] = _rows(data)
        if data.recall:
            rows = list(rows)  # read once, used twice
            rows = itertools.chain(rows, _recall_rows(rows, data))
        return pack_rows(rows, tokenizer, data.seq_len, data.text_field)
    except TextError as error:
        raise ValueError(f"training data: {error}; {_ADVICE[error.about]}") from error


def preset_texts(data: DataConfig, tokenizer: Any) -> dict[str, Tensor]:
    """Takes text to calibrate a dial with, by preset: the `kind` of rows that have one.

    Args:
        data: where the text is.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        For `chat` and `code`, where such rows fill a text, and `bulk`, all others: up to
        `CALIBRATION_TEXTS` evenly spaced texts (M, `CALIBRATION_TOKENS`) int64. All rows are
        `bulk` where the others fill none.

    Raises:
        ValueError: as `load_blocks`, or too little text for `bulk`.
    """
    rows: dict[str, list[Row]] = {}
    for row in _rows(data):
        kind = row[1].get("kind")
        rows.setdefault(kind if kind in PRESETS else DEFAULT_PRESET, []).append(row)
    blocks = {name: _long_texts(part, data, tokenizer) for name, part in sorted(rows.items())}
    if blocks.get(DEFAULT_PRESET) is None:
        everything = [row for part in rows.values() for row in part]
        blocks[DEFAULT_PRESET] = _long_texts(everything, data, tokenizer)
    if blocks[DEFAULT_PRESET] is None:
        raise ValueError(
            f"calibrating a dial takes a text of {CALIBRATION_TOKENS} tokens, and the training "
            "data has less: add text, or leave policy.max_cr out"
        )
    return {
        name: evenly_spaced(part, CALIBRATION_TEXTS)
        for name, part in blocks.items() if part is not None
    }  # fmt: skip


def _long_texts(rows: list[Row], data: DataConfig, tokenizer: Any) -> Tensor | None:
    """(M, CALIBRATION_TOKENS) int64; None where the rows don't fill one text."""
    try:
        return pack_rows(rows, tokenizer, CALIBRATION_TOKENS, data.text_field)
    except TextError as error:
        if error.about == "length":
            return None
        raise ValueError(f"calibration: {error}; {_ADVICE[error.about]}") from error


def split_held_out(blocks: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Takes evenly spaced sequences out for the final measurement.

    Args:
        blocks: (M, seq_len).
        held_out: sequences wanted; at most half of them are taken.

    Returns:
        training (M - h, seq_len) and held-out (h, seq_len) sequences; a single one is both.
    """
    count = min(held_out, len(blocks) // 2)
    if count == 0:
        return blocks, blocks
    picked = torch.linspace(0, len(blocks) - 1, count).long()
    keep = torch.ones(len(blocks), dtype=torch.bool)
    keep[picked] = False
    return blocks[keep], blocks[picked]


def _rows(data: DataConfig) -> Iterator[Row]:
    check_text(data)
    if data.dataset:
        yield from _dataset_rows(data.dataset, data.split)
        return
    for file in data.files:
        yield from read_file(file)


def _recall_rows(rows: Iterable[Row], data: DataConfig) -> Iterator[Row]:
    """Rows of `recall_texts` of `rows`, as many that they are `data.recall` of all text."""
    texts = [_prose(fields, data.text_field) for _, fields in rows]
    left = sum(map(len, texts)) * data.recall / (1 - data.recall)
    for seed in itertools.count():
        made = 0
        for text in recall_texts(texts, seed, data.seq_len):
            yield "recall", {data.text_field: text}
            made += len(text)
            if made >= left:
                return
        if not made:
            raise TextError("data.recall takes text with sentences, and there are none", "empty")
        left -= made


def _prose(fields: dict[str, Any], text_field: str) -> str:
    """The text of a row, without the marks of a chat template."""
    text = fields.get(text_field, fields.get("text"))  # that of a .txt file is always `text`
    if isinstance(text, str):
        return text
    contents = [message.get("content") for message in fields.get("messages", ())]
    return " ".join(content for content in contents if isinstance(content, str))


def _dataset_rows(name: str, split: str) -> Iterator[Row]:
    import datasets

    for number, row in enumerate(datasets.load_dataset(name, split=split)):
        yield f"{name}[{number}]", row
