"""Training text: read rows, tokenise, pack into sequences of one length, shuffle by seed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cachefold.retrofit.config import DataConfig

_SUFFIXES = (".jsonl", ".txt")


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


def load_blocks(data: DataConfig, tokenizer: Any) -> Tensor:
    """Reads and packs all text.

    Args:
        data: where the text is.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        (M, seq_len) int64, in the order of the files.

    Raises:
        ValueError: missing file, broken line, missing field, or not enough text.
    """
    return pack(_token_lists(_rows(data), data, tokenizer), data.seq_len, _end_token(tokenizer))


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


def pack(token_lists: Iterable[list[int]], seq_len: int, end: int | None) -> Tensor:
    """Joins texts with the end token and cuts; the rest that fills no sequence is dropped.

    >>> pack([[1, 2], [3], [4, 5]], 3, 0).tolist()
    [[1, 2, 0], [3, 0, 4]]

    Raises:
        ValueError: no text, or less than one sequence.
    """
    stream: list[int] = []
    for tokens in token_lists:
        stream += tokens
        if end is not None:
            stream.append(end)
    if not stream:
        raise ValueError("the training data is empty; check data.files and data.text_field")
    blocks = len(stream) // seq_len
    if blocks == 0:
        raise ValueError(
            f"the training data has {len(stream)} tokens, less than one sequence of {seq_len}; "
            "add text or lower data.seq_len"
        )
    return torch.tensor(stream[: blocks * seq_len], dtype=torch.int64).view(blocks, seq_len)


def read_file(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of a `.jsonl` or `.txt` file, gzipped or not; a text file is one row.

    Raises:
        ValueError: missing file, other type, or a line that is not a JSON object.
    """
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not path.is_file():
        raise ValueError(f"no training file at {path}; data.files are relative to {Path.cwd()}")
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise ValueError(f"{path}: data files end in {', '.join(_SUFFIXES)}, or those plus .gz")
    try:
        with _open(path) as lines:
            if suffixes[-1] == ".txt":
                yield str(path), {"text": lines.read()}
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_row(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not valid JSON ({error.msg} at column {error.colno})"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a line must be a JSON object, got a {type(row).__name__}")
    return row


def _rows(data: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if data.dataset:
        yield from _dataset_rows(data.dataset, data.split)
        return
    if not data.files:
        raise ValueError("the recipe names no text: set data.files, or data.dataset")
    for file in data.files:
        yield from read_file(file)


def _dataset_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data.dataset {name!r} needs the datasets library: pip install datasets"
        ) from error
    for number, row in enumerate(datasets.load_dataset(name, split=split)):
        yield f"{name}[{number}]", row


def _token_lists(
    rows: Iterable[tuple[str, dict[str, Any]]], data: DataConfig, tokenizer: Any
) -> Iterator[list[int]]:
    for place, row in rows:
        if data.text_field in row and isinstance(row[data.text_field], str):
            text = row[data.text_field]
        elif place.endswith((".txt", ".txt.gz")):
            text = row["text"]
        elif "messages" in row:
            text = _render(row["messages"], place, tokenizer)
        else:
            raise ValueError(
                f"{place}: no text in field {data.text_field!r} and no 'messages'; the row has "
                f"{', '.join(map(repr, row)) or 'no fields'}. Set data.text_field."
            )
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _render(messages: Any, place: str, tokenizer: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # the template language raises what it likes
        raise ValueError(f"{place}: the chat template refuses 'messages': {error}") from error


def _end_token(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "eos_token_id", None)
