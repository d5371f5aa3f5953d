"""The shipped text: held-out text is held out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPARED = (
    "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande",
)  # fmt: skip


def _builder():
    spec = importlib.util.spec_from_file_location("build_data", ROOT / "tools" / "build_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_held_out_text_shares_no_run_of_words_with_the_training_text():
    build = _builder()
    seen = set()
    for row in build.read_rows(ROOT / "data" / "train" / "mix.jsonl.gz"):
        seen |= build.runs_of_words(build.text_of(row))
    files = sorted((ROOT / "data" / "heldout").glob("*.jsonl.gz"))
    assert len(files) == 6 and len(seen) > 100_000
    for file in files:
        for row in build.read_rows(file):
            assert not build.runs_of_words(build.text_of(row)) & seen, file.name


def test_questions_share_no_run_of_words_with_the_training_text():
    build = _builder()
    seen = set()
    for row in build.read_rows(ROOT / "data" / "train" / "mix.jsonl.gz"):
        seen |= build.runs_of_words(build.text_of(row))
    for name in (*COMPARED, "lambada_openai", "mmlu_dev", "mmlu_test"):
        for row in build.read_rows(ROOT / "data" / "eval" / f"{name}.jsonl.gz"):
            for text in (row.get("context", ""), row.get("query", ""), *row.get("choices", [])):
                assert not build.runs_of_words(text) & seen, (name, row["id"])


def test_paragraphs_with_a_seen_run_are_dropped():
    build = _builder()
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    row = build.unseen({"text": f"before\n\n{text}\n\nafter"}, build.runs_of_words(text))
    assert row["text"] == "before\n\nafter"
    talk = {"messages": [{"role": "user", "content": text}]}
    assert build.unseen(talk, build.runs_of_words(text)) is None
