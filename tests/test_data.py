"""The shipped text: held-out text is held out, and the two training files differ."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = ("mix", "more")


def _builder():
    spec = importlib.util.spec_from_file_location("build_data", ROOT / "tools" / "build_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows(build, folder, name):
    return build.read_rows(ROOT / "data" / folder / f"{name}.jsonl.gz")


def _runs(build, rows):
    return set().union(*(build.runs_of_words(build.text_of(row)) for row in rows))


@pytest.mark.parametrize("name", TRAIN)
def test_held_out_text_shares_no_run_of_words_with_the_training_text(name):
    build = _builder()
    held_out = _runs(
        build, (row for file in build.HELD_OUT for row in _rows(build, "heldout", file))
    )
    assert len(list((ROOT / "data" / "heldout").iterdir())) == 6 and len(held_out) > 50_000
    for row in _rows(build, "train", name):
        assert held_out.isdisjoint(build.runs_of_words(build.text_of(row))), row["id"]


@pytest.mark.parametrize("name", TRAIN)
def test_questions_share_no_run_of_words_with_the_training_text(name):
    build = _builder()
    asked = set()
    files = sorted((ROOT / "data" / "eval").glob("*.jsonl.gz"))
    for file in files:
        for row in build.read_rows(file):
            asked.update(*map(build.runs_of_words, build.strings_of(row)))
    assert len(files) == 18 and len(asked) > 500_000
    for row in _rows(build, "train", name):
        assert asked.isdisjoint(build.runs_of_words(build.text_of(row))), row["id"]


@pytest.mark.parametrize("name", TRAIN)
def test_each_kind_has_its_share_of_the_training_text(name):
    build = _builder()
    least = {"mix": build.CHARACTERS_PER_KIND, "more": build.MORE_CHARACTERS_PER_KIND}[name]
    characters = dict.fromkeys(build.KINDS, 0)
    for row in _rows(build, "train", name):
        assert row["source"] and row["license"] and row["id"]
        assert build.size(row) <= build.LONGEST_ROW * (2 if "messages" in row else 1)
        characters[row["kind"]] += build.size(row)
    for kind, number in characters.items():
        assert least <= number < least + 2 * build.LONGEST_ROW, kind


def test_no_row_of_one_training_file_is_in_the_other():
    build = _builder()
    mix = _rows(build, "train", "mix")
    runs_of_mix, again = _runs(build, mix), set()
    for row in _rows(build, "train", "more"):
        runs = build.runs_of_words(build.text_of(row))
        assert not runs <= runs_of_mix, row["id"]
        again |= runs & runs_of_mix
    for row in mix:
        assert not build.runs_of_words(build.text_of(row)) <= again, row["id"]


@pytest.mark.parametrize("name", TRAIN)
def test_the_readme_names_every_licence_of_the_training_text(name):
    build = _builder()
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    articles = readme.split("Articles in `train/`: ")[1].split("\n\n")[0].rstrip(".").split(", ")
    for row in _rows(build, "train", name):
        if row["kind"] in ("docs", "code", "chat"):
            assert f"| {row['source']} | {row['license']} |" in readme
        elif row["kind"] == "wiki":
            assert row["id"] in articles
        else:
            assert f"\n- {row['title']}" in readme


def test_pieces_are_the_beginnings_of_all_rows_before_any_second_part():
    build = _builder()
    long = "\n\n".join(f"{i} " + "word " * 300 for i in range(20))
    rows = [{"text": long, "id": "a"}, {"text": "short " * 50, "id": "b"}]
    pieces = list(build.pieces(rows, "books"))
    ids = [piece["id"] for piece in pieces]
    assert sorted(ids[:2]) == ["a", "b"] and set(ids[2:]) == {"a"}
    parts = [piece["text"] for piece in pieces if piece["id"] == "a"]
    assert len(parts) == 3 and max(map(len, parts)) <= build.LONGEST_ROW
    assert "\n\n".join(parts) == long


def test_drawing_again_goes_on_with_the_next_row():
    build = _builder()
    rows = iter([{"text": letter * 10} for letter in "abcde"])
    assert [row["text"][0] for row in build.draw(rows, 15)] == ["a", "b"]
    assert [row["text"][0] for row in build.draw(rows, 1_000)] == ["c", "d", "e"]


def test_texts_that_are_tested_or_came_before_are_not_fresh():
    build = _builder()
    old, new, tested = ({"text": " ".join(f"{w}{i}" for i in range(20))} for w in ("o", "n", "t"))
    mixed = {"text": new["text"] + "\n\n" + tested["text"]}
    rows = [old, mixed, new, new]
    seen, asked = (build.runs_of_words(row["text"]) for row in (old, tested))
    assert list(build.fresh(rows, seen, asked)) == [new]


def test_paragraphs_with_a_seen_run_are_dropped():
    build = _builder()
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    row = build.unseen({"text": f"before\n\n{text}\n\nafter"}, build.runs_of_words(text))
    assert row["text"] == "before\n\nafter"
    talk = {"messages": [{"role": "user", "content": text}]}
    assert build.unseen(talk, build.runs_of_words(text)) is None
