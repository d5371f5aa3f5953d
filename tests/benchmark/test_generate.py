"""Rows of the decode benchmark."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cachefold.benchmark import generate, imposed, models
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.models import check_pair, folded_logits
from cachefold.benchmark.parity import ParityError
from tests.benchmark.conftest import BANDWIDTH

CONFIG = BenchConfig(
    parts=("generate",), batch=(2,), context=(100,), cr=(1.0, 4.0), repeats=2, steps=2,
    backend="reference",
)  # fmt: skip


def test_rows(pair):
    rows = list(generate.measure(CONFIG, [pair], BANDWIDTH))
    assert [row["cr"] for row in rows] == [1.0, 4.0]
    for row in rows:
        kinds = {kind: row[f"dense_{kind}_float32_tokens_per_s"] for kind in ("static", "dynamic")}
        assert row["dense_tokens_per_s"] == max(kinds.values())
        assert row["dense_variant"] == f"{max(kinds, key=kinds.get)} float32"
        assert row["tokens_per_s"] == row["folded_float32_tokens_per_s"] > 0
        assert row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
        assert row["dense_cache_bytes"] == 2 * 108 * 2 * 2 * 16 * 4
        assert row["backend"] == "reference" and row["dtype"] == "float32"
        assert row["cr_kept"] == pytest.approx(row["cr"], rel=0.05) and row["cr_imposed"]
        ideal = row["dense_cache_bytes"] / row["cr_kept"]
        assert row["cache_overhead"] == pytest.approx(row["cache_bytes"] / ideal)
    assert rows[1]["cache_bytes"] < rows[0]["cache_bytes"]


def test_static_and_dynamic_decode_the_same_tokens(pair):
    first = torch.tensor([[5], [9]])
    found = []
    for cache in (
        StaticCache(config=pair.dense.config, max_cache_len=60),
        DynamicCache(config=pair.dense.config),
    ):
        imposed.fill_dense(cache, pair.dense, pair.shape, 2, 50, seed=0)
        decoder = generate.Decoder(pair.dense, cache, first, steps=3)
        ids = []
        for _ in range(2):
            decoder.visit()
            ids.append(decoder.ids)
        found.append(torch.cat(ids, 1))
        assert int(cache.get_seq_length()) == 56
    assert found[0].equal(found[1]) and not decoder.ids.equal(first)


def test_variants_that_cannot_win_are_timed_once(pair, monkeypatch):
    monkeypatch.setattr(
        generate, "contenders", lambda warm, group: {n for n in warm if n.startswith(group)} -
        {"dense dynamic float32"},
    )  # fmt: skip
    interleaved = []
    keep = generate.interleave
    monkeypatch.setattr(
        generate, "interleave", lambda runs, repeats: interleaved.append(set(runs)) or
        keep(runs, repeats),
    )  # fmt: skip
    [row, _] = generate.measure(CONFIG, [pair], BANDWIDTH)
    assert interleaved == [{"folded 1 float32", "folded 4 float32", "dense static float32"}]
    assert row["dense_dynamic_float32_tokens_per_s"] > 0


def test_loops_split_where_memory_is_short(pair, monkeypatch):
    dense = generate._dense_nbytes(pair, 2, 100)
    assert dense == 2 * 100 * 2 * 2 * 16 * 4  # B T layers K (D + Dv) bytes
    ratios = (1.0, 2.0)

    def loops(available):
        monkeypatch.setattr(generate, "available_bytes", lambda: available)
        return generate._loops([pair], 2, 100, ratios)

    assert loops(10 * dense) == [ratios]
    assert loops(round(4.1 * dense)) == [(1.0,), (2.0,)]
    with pytest.raises(ValueError, match="don't fit into memory"):
        loops(dense)


def test_check_compares_with_reference_and_dense(pair, monkeypatch):
    check_pair(pair, "reference", seed=0)
    wrong = [folded_logits(pair, "reference", cr, 0) for cr in (3.0, 2.0, 1.0)]
    monkeypatch.setattr(models, "folded_logits", lambda *args: wrong.pop())
    with pytest.raises(ParityError, match="whole model, cr 2: logits"):
        check_pair(pair, "reference", seed=0)
    monkeypatch.undo()
    with torch.no_grad():
        pair.dense.lm_head.weight = torch.nn.Parameter(pair.dense.lm_head.weight.roll(1, 0))
    with pytest.raises(ParityError, match="cr 1 and dense"):
        check_pair(pair, "reference", seed=0)
