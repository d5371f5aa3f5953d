"""Text as token ids: read files, tokenise, join and cut into sequences of one length."""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

SUFFIXES = (".jsonl", ".txt")
Row: TypeAlias = tuple[str, dict[str, Any]]
"""Where a row is, for messages, and its fields."""


class TextError(ValueError):
    """Text that can't be used; `about` says which part, so that a caller can add advice."""

    def __init__(self, message: str, about: str) -> None:
        """Keeps `about`: `files`, `field`, `empty` or `length`."""
        super().__init__(message)
        self.about = about


def load_blocks(
    files: Iterable[str | Path],
    tokenizer: Any,
    tokens: int,
    text_field: str = "text",
    stride: int | None = None,
) -> Tensor:
    """Reads and packs all text of some files.

    Every sequence begins as the tokenizer begins a text: Gemma is of little use without its start
    token, and `tests/test_gemma.py` says how much worse.

    Args:
        files: local `.jsonl` or `.txt` files, each also as `.gz`.
        tokenizer: a Hugging Face tokenizer.
        tokens: length of a sequence.
        text_field: field of a row that holds its text; rows with `messages` go through the chat
            template.
        stride: tokens of text from the start of a sequence to that of the next; None = all that a
            sequence has, so that they follow one another.

    Returns:
        (M, tokens) int64, in the order of the files.

    Raises:
        TextError: missing file, broken line, missing field, or not enough text. A ValueError.
    """
    rows = (row for file in files for row in read_file(file))
    return pack_rows(rows, tokenizer, tokens, text_field, stride)


def pack_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    tokens: int,
    text_field: str = "text",
    stride: int | None = None,
) -> Tensor:
    """Tokenises and packs rows; see `load_blocks`."""
    start = _start_ids(tokenizer)
    texts = (text_of(row, tokenizer, text_field) for row in rows)
    ids = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in texts
        if text.strip()  # else each would leave an end token in the training text
    )
    if start:  # a chat template may write it too
        ids = (text[1:] if text[:1] == start else text for text in ids)
    return pack(ids, tokens, getattr(tokenizer, "eos_token_id", None), start, stride)


def _start_ids(tokenizer: Any) -> list[int]:
    """The start token where the tokenizer puts one before a text, else nothing."""
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None or tokenizer("", verbose=False)["input_ids"][:1] != [start]:
        return []
    return [start]


def pack(
    token_lists: Iterable[Sequence[int]],
    tokens: int,
    end: int | None,
    start: Sequence[int] = (),
    stride: int | None = None,
) -> Tensor:
    """Joins texts with the end token and cuts; the rest that fills no sequence is dropped.

    `start` comes before each sequence and counts to its tokens; see `load_blocks` for `stride`.

    >>> pack([[1, 2], [3], [4, 5]], 3, 0).tolist()
    [[1, 2, 0], [3, 0, 4]]
    >>> pack([[1, 2], [3], [4, 5]], 3, 0, start=[9], stride=1)[:3].tolist()
    [[9, 1, 2], [9, 2, 0], [9, 0, 3]]

    Raises:
        TextError: no text, or less than one sequence.
    """
    stream = array("q")  # int64; a list would take five times the memory
    for ids in token_lists:
        stream.extend(ids)
        if end is not None:
            stream.append(end)
    if not stream:
        raise TextError("the text is empty", about="empty")
    width = tokens - len(start)
    if len(stream) < width:
        raise TextError(
            f"the text has {len(stream) + len(start)} tokens, less than one sequence of {tokens}",
            about="length",
        )
    blocks = torch.frombuffer(stream, dtype=torch.int64).unfold(0, width, stride or width)
    before = torch.tensor(start, dtype=torch.int64).expand(len(blocks), -1)
    return torch.cat([before, blocks], 1)


def evenly_spaced(blocks: Tensor, count: int) -> Tensor:
    """Picks `count` of (M, T) sequences, spread over all of them; all where there are fewer.

    >>> evenly_spaced(torch.arange(5)[:, None], 3).flatten().tolist()
    [0, 2, 4]
    """
    return blocks[torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()]


def stem(path: str | Path) -> str:
    """Name of a text file without the endings that say how it is read.

    >>> stem("data/heldout/chat.jsonl.gz"), stem("law.v1.txt")
    ('chat', 'law.v1')
    """
    name = Path(path).name.removesuffix(".gz")
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def check_file(path: str | Path) -> str:
    """Refuses a path that `read_file` can't read, without reading it; returns its type.

    Raises:
        TextError: missing file, or other type.
    """
    path = Path(path)
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if not path.is_file():
        raise TextError(
            f"no text file at {path}; relative paths start from {Path.cwd()}", about="files"
        )
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise TextError(
            f"{path}: text files end in {', '.join(SUFFIXES)}, or those plus .gz", about="files"
        )
    return suffixes[-1]


def read_file(path: str | Path) -> Iterator[Row]:
    """Yields the rows of a `.jsonl` or `.txt` file, gzipped or not; a text file is one row.

    Raises:
        TextError: missing file, other type, damaged file, or a line that is not a JSON object.
    """
    suffix, path = check_file(path), Path(path)
    try:
        with _open(path) as lines:
            if suffix == ".txt":
                yield str(path), {"text": lines.read()}
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _json_row(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TextError(f"{path} can't be read: {error}", about="files") from error


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"{place}: not valid JSON ({error.msg} at column {error.colno})"
        raise TextError(message, about="files") from error
    if not isinstance(row, dict):
        message = f"{place}: a line must be a JSON object, got a {type(row).__name__}"
        raise TextError(message, about="files")
    return row


def text_of(row: Row, tokenizer: Any, text_field: str = "text") -> str:
    """Takes the text of a row: its field, or its `messages` through the chat template.

    Raises:
        TextError: neither is there, or the template refuses.
    """
    place, fields = row
    if isinstance(fields.get(text_field), str):
        return str(fields[text_field])
    if place.endswith((".txt", ".txt.gz")):
        return str(fields["text"])
    if "messages" not in fields:
        raise TextError(
            f"{place}: no text in field {text_field!r} and no 'messages'; the row has "
            f"{', '.join(map(repr, fields)) or 'no fields'}",
            about="field",
        )
    if fields["messages"] == []:
        return ""
    try:
        return str(tokenizer.apply_chat_template(fields["messages"], tokenize=False))
    except Exception as error:  # the template language raises what it likes
        message = f"{place}: the chat template refuses 'messages': {error}"
        raise TextError(message, about="files") from error
