"""Loss, bytes and speed of one method."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from cachefold.evaluation import measure
from cachefold.evaluation.subject import Subject
from cachefold.models.fold import folded
from cachefold.policies import TOVA, Full
from tests.models.tiny import random_ids, tiny_model
from tests.retrofit.tiny import WORDS, make_tokenizer

ENTRY = 2 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, head dim, float32


def write(folder: Path, name: str, count: int) -> Path:
    path = folder / name
    path.write_text(" ".join(WORDS[i % len(WORDS)] for i in range(count)))
    return path


def test_texts(tmp_path: Path) -> None:
    files = [write(tmp_path, "a.txt", 100), write(tmp_path, "b.txt", 300)]
    texts = measure.load_texts(files, make_tokenizer(), pieces=3, tokens=32, context=40)
    assert {name: tuple(ids.shape) for name, ids in texts.pieces.items()} == {
        "a": (3, 32), "b": (3, 32),
    }  # fmt: skip
    assert texts.contexts.shape == (4, 40)
    whole = measure.load_texts(files, make_tokenizer(), pieces=1, tokens=8, context=400)
    assert whole.contexts.shape == (1, 400)
    with pytest.raises(ValueError, match="has 402 tokens, less than one sequence of 500"):
        measure.load_texts(files, make_tokenizer(), pieces=1, tokens=8, context=500)
    with pytest.raises(ValueError, match="no held-out text"):
        measure.load_texts([], make_tokenizer(), pieces=1, tokens=8, context=8)


def test_only_the_ending_of_a_file_is_left_out_of_its_name(tmp_path: Path) -> None:
    files = [write(tmp_path, f"law.{version}.txt", 100) for version in ("v1", "v2", "v2.old")]
    texts = measure.load_texts(files, make_tokenizer(), pieces=1, tokens=32, context=40)
    assert list(texts.pieces) == ["law.v1", "law.v2", "law.v2.old"]
    shipped = sorted((Path(__file__).parents[2] / "data/heldout").glob("*.gz"))
    assert measure.names_of(shipped) == [
        "chat", "code", "moby_dick", "textbook", "wikipedia", "wikitext2",
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["law.jsonl", "law.txt.gz", "law.jsonl.gz"])
def test_two_files_of_one_name_are_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(ValueError, match=f"law.txt and .*{other} would both be called law: rename"):
        measure.names_of([tmp_path / "law.txt", tmp_path / "b.txt", tmp_path / other])


def test_examples_run() -> None:
    assert doctest.testmod(measure).attempted and not doctest.testmod(measure).failed


def test_heldout_of_the_dense_model_is_a_plain_forward() -> None:
    model, ids = tiny_model(), random_ids(3, 24)
    found = measure.heldout(Subject(model, None), ids)
    for piece, loss in zip(ids, found["losses"], strict=True):
        with torch.no_grad():
            assert loss == pytest.approx(model(piece[None], labels=piece[None]).loss.item())
    assert found["tokens"] == found["entries"] == 3 * 23


def test_eviction_is_seen() -> None:
    model, ids = tiny_model(), random_ids(2, 48)
    dense = measure.heldout(Subject(model, None), ids)
    with folded(model, TOVA(cr=8)):
        found = measure.heldout(Subject(model, None), ids)
        held = measure.at_context(model, ids, None)
    assert found["tokens"] > 6 * found["entries"]
    assert all(a != b for a, b in zip(found["losses"], dense["losses"], strict=True))
    assert held["cr_at_context"] == 8 and held["kept_bytes"] < held["dense_cache_bytes"] / 4
    assert held["dense_cache_bytes"] == 48 * ENTRY and held["cache_bytes"] >= held["kept_bytes"]


def test_dense_bytes_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(2, 48)
    found = measure.at_context(model, ids, None)
    assert found["cache_bytes"] == found["dense_cache_bytes"] == 48 * ENTRY
    assert (found["context"], found["texts"], found["cr_at_context"]) == (48, 2, 1.0)
    assert len(found["rates"]) == measure.ROUNDS and min(found["rates"]) > 0
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr(measure, "_now", lambda: next(clock))
    assert measure.at_context(model, ids, None)["tokens_per_s"] == measure.STEPS


def test_a_codec_saves_bytes() -> None:
    model, ids = tiny_model(), random_ids(1, 400)
    with folded(model, Full()):
        sizes = [measure.at_context(model, ids, codec)["cache_bytes"] for codec in (None, "int4")]
        whole = measure.at_context(model, ids, None)
    assert sizes[1] < sizes[0] / 2
    # 400 tokens fill 25 pages of 16; block tables and rotary tables come on top.
    assert whole["cache_bytes"] > whole["kept_bytes"] >= whole["dense_cache_bytes"]
