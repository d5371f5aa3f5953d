"""Held-out loss sees folding."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from torch.nn import functional as F

from cachefold import DMC, fold
from cachefold.evaluation.perplexity import FILES, Perplexity, heldout_loss
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import get_task
from cachefold.text import load_blocks
from tests.models.tiny import random_ids, scramble_decisions, tiny_model


class _Characters:
    eos_token_id = 2

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(c) % 60 for c in text]}


def _text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog. " * 8}))
    return path


def test_a_fresh_fold_costs_nothing_and_merging_is_seen(tmp_path):
    model, file = fold(tiny_model(), DMC(delay=2)), _text_file(tmp_path)
    (fresh,) = heldout_loss(model, _Characters(), [file], pieces=3, tokens=64)
    assert (fresh.pieces, fresh.cr, fresh.increase) == (3, 1.0, 0.0)
    scramble_decisions(model)
    (merged,) = heldout_loss(model, _Characters(), [file], pieces=3, tokens=64)
    assert merged.increase_error > 0 == fresh.increase_error
    assert fresh.bytes_ratio == pytest.approx(1, abs=0.02) and merged.bytes_ratio < 0.98
    assert merged.cr > 1.1 and merged.folded_loss != merged.dense_loss == fresh.dense_loss


def test_the_loss_is_the_usual_cross_entropy(tmp_path):
    model, file = tiny_model(), _text_file(tmp_path)
    ids = torch.tensor([_Characters()(json.loads(file.read_text())["text"])["input_ids"][:64]])
    logits = model(ids).logits[:, :-1]
    expected = F.cross_entropy(logits[0], ids[0, 1:]).item()
    (result,) = heldout_loss(fold(model, DMC()), _Characters(), [file], pieces=1, tokens=64)
    assert result.dense_loss == pytest.approx(expected, abs=1e-5)


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not folded"):
        heldout_loss(tiny_model(), _Characters(), [_text_file(tmp_path)])


def test_trained_weights_are_compared_with_the_base_given(tmp_path):
    trained, file = fold(tiny_model(), DMC()), _text_file(tmp_path)
    for parameter in trained.model.layers.parameters():
        parameter.data *= 1.5
    (result,) = heldout_loss(trained, _Characters(), [file], pieces=1, tokens=64, base=tiny_model())
    (fresh,) = heldout_loss(fold(tiny_model(), DMC()), _Characters(), [file], pieces=1, tokens=64)
    assert result.dense_loss == fresh.dense_loss != result.folded_loss


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with six held-out files, each of 4,000 characters of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "heldout"
    folder.mkdir(parents=True)
    for seed, name in enumerate(FILES):
        text = "".join(chr(61 + i) for i in random_ids(1, 4000, seed)[0].tolist())
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps({"text": text}) + "\n")
    return folder


def test_rows_come_from_all_files_in_turn(data):
    rows = Perplexity(tokens=64).rows(None)
    assert [row["id"] for row in rows[:7]] == [*(f"{name}/0" for name in FILES), "chat/1"]
    assert len(rows) == 6 * (4000 // 384) and len(Perplexity(tokens=64).rows(8)) == 8
    assert len(Perplexity(tokens=64, sliding=True).rows(None)) == 6 * (4000 // 192 - 1)
    with pytest.raises(ValueError, match="limit"):
        Perplexity().rows(0)


def test_the_loss_is_that_of_the_pieces_and_by_context(data):
    task, model = Perplexity(tokens=300), tiny_model()
    rows = task.rows(7)
    found = list(task.evaluate(rows, Subject(model, _Characters())))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    piece = load_blocks([data / "chat.jsonl.gz"], _Characters(), 300)[1]
    logits = model(piece[None]).logits[0, :-1]
    nats = F.cross_entropy(logits, piece[1:], reduction="none")
    assert found[6]["loss"] == pytest.approx(nats.mean().item(), abs=1e-5)
    assert found[6]["loss_to_128"] == pytest.approx(nats[:127].mean().item(), abs=1e-5)
    assert found[6]["loss_to_256"] == pytest.approx(nats[127:255].mean().item(), abs=1e-5)
    assert found[6]["loss_to_300"] == pytest.approx(nats[255:].mean().item(), abs=1e-5)
    summary = task.summarise(found)
    assert list(summary)[:2] == ["loss", "perplexity"] and "loss_to_300" in summary
    assert summary["perplexity"].value == pytest.approx(math.exp(summary["loss"].value))


def test_windows_that_slide_count_only_tokens_with_half_a_window_before_them(data):
    task, model = Perplexity(tokens=64, sliding=True), tiny_model()
    rows = [row for row in task.rows(None) if row["file"] == "code"][:3]
    found = list(task.evaluate(rows, Subject(model, _Characters())))
    ids = load_blocks([data / "code.jsonl.gz"], _Characters(), 32).flatten()
    for index, row in enumerate(found):
        window = ids[32 * index : 32 * index + 64]
        nats = F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
        assert row["loss"] == pytest.approx(nats[31:].mean().item(), abs=1e-5)
        assert set(row) == {"id", "loss"}


def test_windows_that_slide_count_every_token_once_behind_a_start_token(data):
    class Starting(_Characters):
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [1] * add_special_tokens + super().__call__(text)["input_ids"]}

    model, rows = tiny_model(), Perplexity(tokens=64, sliding=True).rows(None)
    rows = [row for row in rows if row["file"] == "code"][:2]
    task = Perplexity(tokens=64, sliding=True)
    found = list(task.evaluate(rows, Subject(model, Starting())))
    ids = load_blocks([data / "code.jsonl.gz"], _Characters(), 200)[0]
    for index, row in enumerate(found):
        window = torch.cat([torch.tensor([1]), ids[32 * index : 32 * index + 63]])
        nats = F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
        assert row["loss"] == pytest.approx(nats[31:].mean().item(), abs=1e-5)


def test_merging_is_seen_by_the_task(data):
    model, task = fold(tiny_model(), DMC(delay=2)), Perplexity(tokens=256)
    [fresh] = task.evaluate(task.rows(1), Subject(model, _Characters()))
    scramble_decisions(model)
    subject = Subject(model, _Characters())
    [merged] = task.evaluate(task.rows(1), subject)
    assert merged["loss"] != fresh["loss"] and subject.footprint.cr > 1.1


def test_the_tasks_are_named_by_length_and_their_files_are_long_enough():
    for name in ("perplexity-512", "perplexity-8192", "perplexity-sliding-8192"):
        task = get_task(name)
        assert task.name == name and len(task.rows(None)) >= 6
    with pytest.raises(ValueError, match="even"):
        Perplexity(tokens=63)
