"""Reading and packing text."""

from __future__ import annotations

import doctest
import functools
import gzip
import json
from pathlib import Path

import pytest

from cachefold import text
from cachefold.text import _start_ids, load_blocks
from tests.retrofit.tiny import make_tokenizer


def load(path: Path, tokens: int = 4, **options: str) -> list[list[int]]:
    return load_blocks([path], make_tokenizer(), tokens, **options).tolist()


def test_text_field_messages_and_plain_text_give_the_same_ids(tmp_path: Path) -> None:
    content = "user w0 assistant w1"
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": content}) + "\n\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "c.txt").write_text(content)
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": content}))
    with gzip.open(tmp_path / "e.txt.gz", "wt") as file:
        file.write(content)
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": content}))
    expected = [[2, 4, 3, 5, 0]]
    for name in ("a.jsonl", "b.jsonl", "c.txt", "e.txt.gz", "f.jsonl.gz"):
        assert load(tmp_path / name, 5) == expected, name
    assert load(tmp_path / "d.jsonl", 5, text_field="body") == expected
    assert load(tmp_path / "c.txt", 5, text_field="body") == expected


def test_texts_are_joined_with_the_end_token_and_the_rest_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w0 w1"}\n{"text": "w2"}\n{"text": "w3 w4"}\n')
    assert load(tmp_path / "a.jsonl", 3) == [[4, 5, 0], [6, 0, 7]]


class _Starting:
    """Characters as ids, with the start token 1, which the chat template writes too."""

    bos_token_id, eos_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool = True, **options):
        return {"input_ids": [1] * add_special_tokens + [1 if c == "^" else ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "^" + "".join(message["content"] for message in messages)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "abc"}]}, {"text": "de"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b, c, d, e = map(ord, "abcde")
    load = functools.partial(load_blocks, [tmp_path / "a.jsonl"], _Starting())
    assert load(4).tolist() == [[1, a, b, c], [1, 0, d, e]]
    assert load(4, stride=2).tolist() == [[1, a, b, c], [1, c, 0, d], [1, d, e, 0]]
    assert load(8).tolist() == [[1, a, b, c, 0, d, e, 0]]
    with pytest.raises(text.TextError, match="has 8 tokens, less than one sequence of 9"):
        load(9)


def test_a_start_token_that_the_tokenizer_does_not_write_stays_away() -> None:
    tokenizer = make_tokenizer()
    assert _start_ids(tokenizer) == []
    tokenizer.bos_token = "w0"  # has one, as SmolLM2 does, and puts none before a text
    assert _start_ids(tokenizer) == [] and _start_ids(_Starting()) == [1]


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    for i in (0, 1):
        (tmp_path / f"{i}.txt").write_text(f"w{i}")
    files = [tmp_path / "1.txt", str(tmp_path / "0.txt")]
    assert load_blocks(files, make_tokenizer(), 2).tolist() == [[5, 0], [4, 0]]


def test_rows_with_empty_text_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "w0"}, {"text": " \n"}, {"messages": []}, {"text": "w1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(tmp_path / "a.jsonl") == [[4, 0, 5, 0]]


@pytest.mark.parametrize(
    ("name", "content", "about", "message"),
    [
        ("a.jsonl", '{"text": "w0"}\n{"text": \n', "files", r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "w0"}\n[1]\n', "files", r"a.jsonl:2: a line must be a JSON object"),
        ("a.jsonl", '{"txt": "w0"}\n', "field", r"a.jsonl:1: no text in field 'text'.*'txt'"),
        ("a.jsonl", '{"text": 5}\n', "field", r"a.jsonl:1: no text in field"),
        ("a.jsonl", '{"messages": 5}\n', "files", r"a.jsonl:1: the chat template refuses"),
        ("a.jsonl", "", "empty", "the text is empty"),
        ("a.jsonl", '{"text": ""}\n' * 9, "empty", "the text is empty"),
        ("a.txt", "\n", "empty", "the text is empty"),
        ("a.txt", "w0 w1", "length", "has 3 tokens, less than one sequence of 4"),
        ("a.csv", "w0", "files", "text files end in .jsonl, .txt"),
        ("a.txt.gz", "not gzip", "files", "can't be read"),
    ],
)
def test_bad_files_say_where(
    tmp_path: Path, name: str, content: str, about: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(text.TextError, match=message) as caught:
        load(tmp_path / name)
    assert caught.value.about == about and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_gzip_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    data = bytearray(gzip.compress(json.dumps({"text": "w0 w1 " * 400}).encode()))
    if damage == "cut":
        data = data[:30]
    else:
        data[10:20] = b"\xff" * 10  # no valid block: zlib itself complains, not gzip
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz can't be read: .+") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_missing_file_says_where_paths_start() -> None:
    with pytest.raises(ValueError, match="no text file at none.txt; relative paths start from"):
        load(Path("none.txt"))


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(text).failed == 0
