"""Builds the small text files this repository ships from a folder of full data sets.

    python tools/build_data.py SOURCE_DIR

SOURCE_DIR holds `train/*.jsonl.gz` and `lm/*.gz` in the form data/README.md describes;
data/eval is read too, for what training text must not have. The result is the same every time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

KINDS = ("books", "textbooks", "docs", "code", "wiki", "chat")
CHARACTERS_PER_KIND = 520_000
MORE_CHARACTERS_PER_KIND = 1_400_000
LONGEST_ROW = 12_000
HELD_OUT = {
    "moby_dick": "book_moby_dick.txt.gz",
    "chat": "chat.jsonl.gz",
    "code": "code_python.jsonl.gz",
    "textbook": "textbook_business_ethics.jsonl.gz",
    "wikipedia": "wikipedia_articles.jsonl.gz",
    "wikitext2": "wikitext2_test_raw.txt.gz",
}
HELD_OUT_CHARACTERS = 90_000
SHARED_WORDS = 13
"""Held-out text has no run of this many words in common with the training text."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl.gz, or one row of a .txt.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        if path.name.endswith(".txt.gz"):
            return [{"text": file.read(), "source": path.name}]
        return [json.loads(line) for line in file]


def shorten(text: str, limit: int) -> str:
    """Cuts at the last paragraph, line or space before `limit` characters."""
    if len(text) <= limit:
        return text
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, limit // 2, limit)
        if end > 0:
            return text[:end]
    return text[:limit]


def size(row: dict[str, Any]) -> int:
    """Characters of a row."""
    return (
        sum(len(m["content"]) for m in row["messages"]) if "messages" in row else len(row["text"])
    )


def order(row: dict[str, Any]) -> str:
    """A fixed shuffle: by digest of the row."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def parts(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A text in parts of at most LONGEST_ROW, without overlap; a conversation whole."""
    if "messages" in row:
        yield row
        return
    rest = row["text"]
    while rest:
        part = shorten(rest, LONGEST_ROW)
        yield {**row, "text": part}
        # Only line ends go: spaces may be the indentation of code.
        rest = rest[len(part) :].lstrip("\n")


def pieces(rows: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """The beginnings of all rows in a fixed order, then their second parts, and so on."""
    rounds = zip_longest(*(parts(row) for row in sorted(rows, key=order)))
    for piece in chain.from_iterable(rounds):
        if piece is not None and 200 <= size(piece) <= 2 * LONGEST_ROW:
            yield {**piece, "kind": kind}


def draw(rows: Iterable[dict[str, Any]], characters: int) -> list[dict[str, Any]]:
    """The next rows, until they have `characters` or none is left; the others stay in `rows`."""
    taken, total = [], 0
    for row in rows:
        taken.append(row)
        total += size(row)
        if total >= characters:
            break
    return taken


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes .jsonl.gz without time stamp, so that equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=9) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    path.write_bytes(buffer.getvalue())
    print(f"{path}: {len(rows)} rows, {sum(map(size, rows)):,} characters, {buffer.tell():,} bytes")


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """All runs of SHARED_WORDS words, lower case, punctuation left out."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def text_of(row: dict[str, Any]) -> str:
    """All text of a row."""
    if "messages" in row:
        return "\n\n".join(message["content"] for message in row["messages"])
    return row["text"]


def unseen(row: dict[str, Any], seen: set[tuple[str, ...]]) -> dict[str, Any] | None:
    """A row without what the training text has too: paragraphs go; a conversation goes whole."""
    if "messages" in row:
        return None if runs_of_words(text_of(row)) & seen else row
    kept = [part for part in row["text"].split("\n\n") if not runs_of_words(part) & seen]
    text = "\n\n".join(kept)
    # A run may also span what is left of two paragraphs.
    return None if runs_of_words(text) & seen else {**row, "text": text}


def strings_of(row: dict[str, Any]) -> list[str]:
    """All texts of an evaluation row: what is asked, the choices, the solution."""
    values = chain.from_iterable(v if isinstance(v, list) else [v] for v in row.values())
    return [value for value in values if isinstance(value, str)]


def fresh(
    rows: Iterable[dict[str, Any]], seen: set[tuple[str, ...]], tested: set[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """Leaves out rows with a run of words in `tested`, and texts that came before.

    A text came before if `seen` and the earlier rows have all of its runs.
    """
    seen = set(seen)
    for row in rows:
        runs = runs_of_words(text_of(row))
        if not runs & tested and not runs <= seen:
            seen |= runs
            yield row


def hold_out(source: Path, seen: set[tuple[str, ...]]) -> dict[str, list[dict[str, Any]]]:
    """The held-out rows of each set, without what is in `seen`."""
    sets = {}
    for name, file in HELD_OUT.items():
        rows, total = [], 0
        for row in read_rows(source / "lm" / file):
            if total >= HELD_OUT_CHARACTERS:
                break
            if "messages" not in row:
                row = {**row, "text": shorten(row["text"], HELD_OUT_CHARACTERS)}
            if (kept := unseen(row, seen)) is not None:
                rows.append(kept)
                total += size(kept)
        sets[name] = rows
    return sets


def main(source: Path, target: Path) -> None:
    """Builds all files."""
    left = {}
    for kind in KINDS:
        paths = sorted((source / "train").glob(f"{kind}-*"))
        left[kind] = pieces([row for path in paths for row in read_rows(path)], kind)
    mixed = [row for kind in KINDS for row in draw(left[kind], CHARACTERS_PER_KIND)]
    write_rows(target / "train" / "mix.jsonl.gz", sorted(mixed, key=order))

    seen = set().union(*(runs_of_words(text_of(row)) for row in mixed))
    held_out = hold_out(source, seen)
    for name, rows in held_out.items():
        write_rows(target / "heldout" / f"{name}.jsonl.gz", rows)

    texts = [text_of(row) for rows in held_out.values() for row in rows]
    for path in sorted((target / "eval").glob("*.jsonl.gz")):
        texts += [text for row in read_rows(path) for text in strings_of(row)]
    tested = set().union(*map(runs_of_words, texts))
    more = []
    for kind in KINDS:
        more += draw(fresh(left[kind], seen, tested), MORE_CHARACTERS_PER_KIND)
    write_rows(target / "train" / "more.jsonl.gz", sorted(more, key=order))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent.parent / "data")
