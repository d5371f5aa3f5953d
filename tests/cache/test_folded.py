"""FoldedCache: accounting, files, the contract of transformers' Cache."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from transformers import LlamaConfig

from cachefold.cache import FoldedCache, FoldedLayer, storage
from cachefold.core.accounting import entries_kept
from cachefold.core.decisions import constrain
from tests.cache.texts import (
    DIM,
    HEADS,
    Text,
    as_rows,
    expected_rows,
    feed,
    make_text,
    poison,
    stream_rows,
)  # fmt: skip


def config(**changes) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=3,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        **changes,
    )


def filled(window: int | None = None) -> tuple[FoldedCache, Text]:
    cache = FoldedCache(config(), [0, 2], delay=4, window=window)
    text = make_text(2, 30, [0, 5], 0.7)
    for index in (0, 2):
        feed(cache.layers[index], text, [0, 20])
    cache.update(text.key[:, :, :20], text.value[:, :, :20], 1)
    return cache, text


def test_reset_equals_new():
    cache, text = filled()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0 and cache.compression_ratio() == 1.0
    stream = feed(cache.layers[0], text, [0, 10])
    fresh = feed(FoldedLayer(4, None), text, [0, 10])
    assert stream_rows(stream, 1, 0, -1, 4) == stream_rows(fresh, 1, 0, -1, 4)


@pytest.mark.parametrize("window", [None, 3])
def test_save_and_load(tmp_path, window):
    cache, text = filled(window)
    poison(cache.layers[0])
    cache.save(tmp_path / "a.safetensors")
    other = FoldedCache(config(), [0, 2], delay=4, window=window).load(tmp_path / "a.safetensors")
    assert (
        other.compression_ratio() == cache.compression_ratio() and other.nbytes() == cache.nbytes()
    )
    assert [e.tolist() for e in other.entries()] == [e.tolist() for e in cache.entries()]
    assert other.allocated_nbytes() == cache.allocated_nbytes()
    assert other.get_seq_length() == 20 and torch.equal(other.layers[1].keys, cache.layers[1].keys)
    for layer in (cache.layers[0], other.layers[0]):
        stream = feed(layer, text, [20, 30])
        got = as_rows(stream_rows(stream, 1, 1, -1, 4))
        torch.testing.assert_close(got, as_rows(expected_rows(text, 1, 1, 29, 4, window)))


def test_load_errors_teach(tmp_path):
    cache, _ = filled()
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="doesn't exist"):
        cache.load(path)
    path.write_bytes(b"not a cache at all")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        cache.load(path)
    cache.save(path)
    with pytest.raises(ValueError, match="delay=4, but this cache has delay=8"):
        FoldedCache(config(), [0, 2], delay=8).load(path)
    with pytest.raises(ValueError, match="folded_layers"):
        FoldedCache(config(), [0], delay=4).load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a saved cache"):
        cache.load(path)


def test_accounting():
    cache, text = filled()
    kept = entries_kept(constrain(text.alpha, text.valid)[:, :, :20], text.valid[:, :20], 4)
    tokens = 20 + 15
    assert [e.tolist() for e in cache.entries()] == [kept.tolist()] * 2
    assert cache.compression_ratio() == pytest.approx(tokens * HEADS / kept.sum().item())
    assert cache.map().shape == (2, HEADS)
    torch.testing.assert_close(cache.map()[0], tokens / kept.sum(0).float())
    entry = 2 * DIM * 8
    dense_layer = 2 * HEADS * 20 * entry  # transformers keeps padding
    assert cache.dense_nbytes() == 2 * tokens * HEADS * entry + dense_layer
    sums = 2 * 2 * HEADS * 8  # z of the open entry, per folded layer, sequence and head
    assert cache.nbytes() == 2 * kept.sum().item() * entry + sums + dense_layer
    assert cache.allocated_nbytes() > cache.nbytes()


def test_transformers_contract():
    cache, _ = filled()
    layer = cache.layers[0]
    assert layer.get_mask_sizes(3) == (23, 0) and layer.get_max_length() == -1
    assert layer.get_max_cache_shape() == -1 and cache.get_max_length(0) == -1
    assert not cache.is_compileable and not cache.is_croppable and cache.is_sliding == [False] * 3
    assert cache.is_initialized and cache.get_seq_length() == 20
    before = cache.layers[1].keys
    with pytest.raises(ValueError, match="assisted"):
        cache.crop(-1)
    assert cache.layers[1].keys is before
    with pytest.raises(TypeError, match="fold"):
        cache.update(torch.ones(1), torch.ones(1), 0)
    layer.offload()
    layer.prefetch()
    assert layer.get_seq_length() == 20


def test_rejects_layers_that_cannot_fold():
    with pytest.raises(ValueError, match="doesn't exist"):
        FoldedCache(config(), [3])
    from transformers import MistralConfig

    sliding = MistralConfig(num_hidden_layers=1, sliding_window=8)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        FoldedCache(sliding, [0])


def test_save_and_load_beside_a_sliding_layer(tmp_path):
    from transformers import Qwen2Config

    mixed = Qwen2Config(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=4, num_key_value_heads=HEADS,
        use_sliding_window=True, sliding_window=8, max_window_layers=0,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    cache, text = FoldedCache(mixed, [0], delay=4), make_text(4, 20, [0], 0.5)
    feed(cache.layers[0], text, [0, 20])
    cache.update(text.key, text.value, 1)
    cache.save(tmp_path / "a.safetensors")
    other = FoldedCache(mixed, [0], delay=4).load(tmp_path / "a.safetensors")
    assert other.get_seq_length(1) == 20
    assert other.get_mask_sizes(1, 1) == cache.get_mask_sizes(1, 1)
    assert torch.equal(other.layers[1].keys, cache.layers[1].keys)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_key_value_heads": 4}, "num_kv_heads=2, but this cache has num_kv_heads=4"),
        ({"head_dim": 8}, "head_dim=6, but this cache has head_dim=8"),
        ({"dtype": "bfloat16"}, "dtype=None, but this cache has dtype='bfloat16'"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, changes, match):
    cache, _ = filled()
    cache.save(tmp_path / "a.safetensors")
    other = LlamaConfig(**{**config().to_dict(), **changes})
    with pytest.raises(ValueError, match=match):
        FoldedCache(other, [0, 2], delay=4).load(tmp_path / "a.safetensors")


def test_tensors_that_belie_their_config_are_refused(tmp_path):
    cache, text = FoldedCache(config(head_dim=8), [0, 2], delay=4), make_text(2, 9, [0], 0.5)
    feed(cache.layers[0], text, [0, 9])
    cache.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds 2 kv heads of 6 channels, but .* 2 of 8"):
        FoldedCache(config(head_dim=8), [0, 2], delay=4).load(tmp_path / "a.safetensors")


def test_a_failed_save_leaves_the_file_before_it(tmp_path, monkeypatch):
    cache, _ = filled()
    path = tmp_path / "a.safetensors"
    cache.save(path)
    before = path.read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["entries", "folded", "layers", "limit", "pages", "ring", "state", "storage", "stream"]
)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"cachefold.cache.{name}"))
    has_examples = ("entries", "folded", "pages", "ring", "stream")
    assert not result.failed and (result.attempted or name not in has_examples)
