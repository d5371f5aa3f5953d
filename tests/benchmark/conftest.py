"""A tiny model on disk, and a run that measures almost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachefold.benchmark.machine import Bandwidth, Reader
from cachefold.benchmark.models import Pair, make_pair
from tests.models.tiny import tiny_model
from tests.retrofit.tiny import make_tokenizer

BANDWIDTH = Bandwidth(10.0, "torch sum", {"torch sum": 10.0})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "base"
    tiny_model(eos_token_id=0, bos_token_id=None).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pair() -> Pair:
    return make_pair(tiny_model(), "float32")


@pytest.fixture
def reader() -> Reader:
    return Reader(nbytes=1 << 16)


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads hundreds of MiB, and none changes the threads of the others."""
    monkeypatch.setattr("cachefold.benchmark.run.Reader", lambda: Reader(nbytes=1 << 16))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
