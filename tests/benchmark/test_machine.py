"""Bandwidth, threads and environment of this machine."""

from __future__ import annotations

import json

import pytest
import torch

from cachefold.benchmark import machine
from cachefold.benchmark.machine import Reader


def test_bandwidth_is_that_of_the_best_method(reader):
    found = reader.bandwidth(repeats=1)
    assert found.gbps == found.methods[found.method] == max(found.methods.values()) > 0
    assert {"torch sum", "torch dot"} <= set(found.methods)


def test_methods_read_the_whole_buffer(reader):
    pytest.importorskip("numba")
    reader.buffer[-1] = 5.0
    methods = reader._methods()
    assert methods["torch sum"][0]() == methods["numba sum"][0]() == reader.buffer.numel() + 4
    assert methods["torch dot"][0]() == reader.buffer.numel() // 2 + 4
    assert {nbytes for _, nbytes in methods.values()} == {reader.nbytes}


def test_buffer_is_larger_than_the_caches(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 40 * machine.MEBI)
    assert Reader().nbytes == 320 * machine.MEBI


def test_threads(monkeypatch):
    torch.set_num_threads(1)
    assert machine.set_threads(None) == torch.get_num_threads() == 1
    most = len(machine.os.sched_getaffinity(0))
    assert machine.set_threads(most) == torch.get_num_threads() == most
    with pytest.raises(ValueError, match=f"--threads {most + 1} is more than the {most} CPUs"):
        machine.set_threads(most + 1)


def test_environment_can_be_written():
    facts = json.loads(json.dumps(machine.environment()))
    assert facts["torch"] == torch.__version__ and facts["cachefold"] == "0.1.0"
    assert facts["threads"] == torch.get_num_threads() and facts["load_at_start"] >= 0
