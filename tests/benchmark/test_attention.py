"""Rows of the attention benchmark."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cachefold.benchmark import attention
from cachefold.benchmark.config import BenchConfig
from cachefold.benchmark.parity import ParityError
from cachefold.benchmark.synthetic import Shape
from tests.benchmark.conftest import BANDWIDTH

SMALL = Shape(layers=4, heads=4, kv_heads=2, head_dim=16)
CONFIG = BenchConfig(
    parts=("attention",), batch=(1, 2), context=(96,), cr=(2.0, 4.0), repeats=2,
    dtype=("float32",), backend="reference",
)  # fmt: skip


def test_rows(reader):
    rows = list(attention.measure(CONFIG, SMALL, reader, BANDWIDTH))
    assert [(row["batch"], row["context"], row["cr"]) for row in rows] == [
        (1, 96, 2.0), (1, 96, 4.0), (2, 96, 2.0), (2, 96, 4.0),
    ]  # fmt: skip
    for row in rows:
        assert row["cr_imposed"] and row["cr_kept"] == pytest.approx(row["cr"], rel=0.02)
        assert row["backend"] == "reference" and row["dtype"] == "float32"
        assert row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["sdpa_ms"] == min(row["sdpa_bfloat16_ms"], row["sdpa_float32_ms"])
        assert row["sdpa_ms"] == row[f"sdpa_{row['sdpa_dtype']}_ms"]
        assert row["speedup_dense"] == pytest.approx(row["dense_ms"] / row["ms"])
        assert row["roofline_ms"] == pytest.approx(row["bytes"] / 10e9 * 1e3)
        assert row["bandwidth_fraction"] == pytest.approx(row["roofline_ms"] / row["ms"])
    assert rows[0]["dense_ms"] == rows[1]["dense_ms"] and rows[0]["bytes"] > rows[1]["bytes"]


def test_entries_with_a_bias_are_one_channel_wider(reader):
    sizes = []
    for proportional in (False, True):
        shape = replace(SMALL, proportional=proportional)
        row = next(iter(attention.measure(CONFIG, shape, reader, BANDWIDTH)))
        sizes.append(row["bytes"])
    assert 1 < sizes[1] / sizes[0] <= (2 * 16 + 1) / (2 * 16)


def test_cr_1_is_its_own_dense_row(reader):
    config = BenchConfig(
        parts=("attention",), batch=(1,), context=(64,), cr=(1.0,), repeats=3,
        backend="reference",
    )  # fmt: skip
    [row] = attention.measure(config, SMALL, reader, BANDWIDTH)
    assert row["dense_ms"] == row["ms"] and row["cr_kept"] == 1.0


def test_caches_are_emptied_before_every_visit(reader, monkeypatch):
    reads = []
    monkeypatch.setattr(reader, "read", lambda: reads.append(1))
    config = BenchConfig(
        parts=("attention",), batch=(1,), context=(64,), cr=(1.0, 2.0), repeats=3,
        backend="reference",
    )  # fmt: skip
    list(attention.measure(config, SMALL, reader, BANDWIDTH))
    variants = 2 * 2 + 4  # step and attention for each ratio, SDPA plain and packed in two dtypes
    assert len(reads) == 3 * variants


def test_nothing_is_timed_after_a_failed_check(reader, monkeypatch):
    def fail(*args, **kwargs):
        raise ParityError("wrong")

    monkeypatch.setattr(attention, "check_backend", fail)
    monkeypatch.setattr(attention, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(ParityError):
        list(attention.measure(CONFIG, SMALL, reader, BANDWIDTH))


def test_copies_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(attention, "last_level_cache", lambda: 1000)
    assert attention._count(nbytes=500, layers=30) == 8
    assert attention._count(nbytes=10, layers=30) == 30
    assert attention._count(nbytes=10_000, layers=30) == attention.FEWEST_COPIES


def test_packed_sdpa_is_the_same_attention():
    outs = []
    for packed in (False, True):
        run = attention._sdpa(SMALL, 2, 40, torch.float32, packed, seed=3)[0]
        outs.append(run)
    # Not the same random queries: give the packed one those of the plain one.
    plain, packed = outs
    query, *rest = plain.args
    key, value = rest
    got = packed.func(query.view(2, 2, 2, 16), key, value, **packed.keywords)
    assert torch.allclose(got.flatten(1, 2)[:, :, None], plain(), atol=1e-5)
