"""The folding layer against a token-by-token recurrence in plain Python."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.core.accounting import entries_kept
from cachefold.core.decisions import constrain

HEADS, DIM, ROTARY = 2, 6, 4


@dataclass
class Text:
    """Random inputs of a layer, float64."""

    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    alpha: torch.Tensor
    omega: torch.Tensor
    valid: torch.Tensor

    def part(self, start: int, stop: int) -> list[torch.Tensor]:
        long = (self.key, self.value, self.cos, self.sin, self.alpha, self.omega, self.valid)
        return [x[:, start:stop] if x is self.cos or x is self.sin or x is self.valid
                else x[:, :, start:stop] for x in long]  # fmt: skip


def make_text(
    seed: int, tokens: int, padding: list[int], merge_rate: float, trailing: int = 0
) -> Text:
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    draw = {"generator": generator, "dtype": torch.float64}
    angle = torch.rand(batch, tokens, ROTARY // 2, **draw) * 6
    angle = torch.cat([angle, angle], -1)
    valid = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    if trailing:
        valid[-1, -trailing:] = False
    return Text(
        torch.randn(batch, HEADS, tokens, DIM, **draw),
        torch.randn(batch, HEADS, tokens, DIM, **draw),
        angle.cos(),
        angle.sin(),
        (torch.rand(batch, HEADS, tokens, **draw) < merge_rate).double(),
        torch.rand(batch, HEADS, tokens, **draw) * 0.9 + 0.1,
        valid,
    )


def turn(x: list[float], cos: list[float], sin: list[float]) -> list[float]:
    """Rotary embedding of one vector, pairs (c, c + ROTARY/2), written out."""
    half, out = ROTARY // 2, list(x)
    for c in range(half):
        out[c] = x[c] * cos[c] - x[c + half] * sin[c]
        out[c + half] = x[c + half] * cos[c + half] + x[c] * sin[c + half]
    return out


def expected_rows(
    text: Text, b: int, k: int, i: int, delay: int, window: int | None
) -> list[list[float]]:
    """What query i sees: entries in order, then the exact tokens; rows are rotated key + value."""
    entries: list[list[int]] = []
    for j in range(i - delay + 1):
        if not text.valid[b, j]:
            continue
        can_merge = j > 0 and bool(text.valid[b, j - 1])
        if can_merge and text.alpha[b, k, j] == 1:
            entries[-1].append(j)
        else:
            entries.append([j])
    rows = []
    for entry in entries:
        members = entry if window is None else entry[-window:]
        weight = sum(text.omega[b, k, j].item() for j in members)
        mean = [
            [sum(text.omega[b, k, j].item() * x[b, k, j, d].item() for j in members) / weight
             for d in range(DIM)] for x in (text.key, text.value)
        ]  # fmt: skip
        cos, sin = text.cos[b, entry[-1]].tolist(), text.sin[b, entry[-1]].tolist()
        rows.append(turn(mean[0], cos, sin) + mean[1])
    for j in range(max(i - delay + 1, 0), i + 1):
        if text.valid[b, j]:
            cos, sin = text.cos[b, j].tolist(), text.sin[b, j].tolist()
            rows.append(turn(text.key[b, k, j].tolist(), cos, sin) + text.value[b, k, j].tolist())
    return rows


def stream_rows(stream, b: int, k: int, row: int, delay: int) -> list[list[float]]:
    """What stream token `row` sees, by the contract between cache and attention."""
    rows = []
    for s in range(stream.closed_mask.shape[-1]):
        if stream.closed_mask[b, k, s]:
            rows.append(stream.closed_key[b, k, s].tolist() + stream.closed_value[b, k, s].tolist())

    def turned(key: torch.Tensor, value: torch.Tensor, j: int) -> list[float]:
        cos, sin = stream.cos[b, j].tolist(), stream.sin[b, j].tolist()
        return turn(key[b, k, j].tolist(), cos, sin) + value[b, k, j].tolist()

    for j in range(max(stream.num_prefix - 1, 0), row - delay + 1):
        if stream.valid[b, j] and (j == row - delay or stream.alpha[b, k, j + 1] == 0):
            rows.append(turned(stream.merged_key, stream.merged_value, j))
    for j in range(max(row - delay + 1, stream.num_prefix), row + 1):
        if stream.valid[b, j]:
            rows.append(turned(stream.key, stream.value, j))
    return rows


def as_rows(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def poison(layer: FoldedLayer) -> None:
    """NaN into every buffer slot that holds no entry."""
    if layer.closed_key is None:
        return
    free = torch.arange(layer.closed_key.shape[2]) >= layer.lengths[..., None]
    layer.closed_key[free] = math.nan
    layer.closed_value[free] = math.nan


def feed(
    layer: FoldedLayer, text: Text, bounds: list[int], delay: int, window: int | None, check=None
):
    for start, stop in itertools.pairwise(bounds):
        poison(layer)
        stream = layer.extend(*text.part(start, stop), delay=delay, window=window)
        if check is not None:
            check(stream, start, stop)
    return stream


def cut(tokens: int, sizes: list[int]) -> list[int]:
    bounds = [0]
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + sizes[(len(bounds) - 1) % len(sizes)], tokens))
    return bounds


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("delay", [0, 1, 4, 20])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 28),
    padding=st.lists(st.integers(0, 6), min_size=1, max_size=2),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    trailing=st.sampled_from([0, 0, 2]),
)
def test_extend_equals_recurrence(window, delay, seed, tokens, padding, rate, sizes, trailing):
    text = make_text(seed, tokens, padding, rate, trailing)
    layer = FoldedLayer()

    def check(stream, start, stop):
        new = stop - start
        for b in range(len(padding)):
            for k in range(HEADS):
                for i in range(start, stop):
                    row = stream.valid.shape[1] - new + i - start
                    got = as_rows(stream_rows(stream, b, k, row, delay))
                    want = as_rows(expected_rows(text, b, k, i, delay, window))
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    feed(layer, text, cut(tokens, sizes), delay, window, check)
    assert layer.get_seq_length() == tokens
    kept = entries_kept(constrain(text.alpha, text.valid), text.valid, delay)
    assert layer.entries().tolist() == kept.tolist()


def test_mean_of_an_entry_stays_in_float32():
    """In bfloat16, 300 merged tokens of value 1 and one of 2 keep their true mean."""
    layer = FoldedLayer()
    one = torch.ones(1, 1, 1, DIM, dtype=torch.bfloat16)
    angle = torch.zeros(1, 1, ROTARY, dtype=torch.bfloat16)
    for step in range(301):
        x = one * (2 if step == 300 else 1)
        stream = layer.extend(
            x, x, angle + 1, angle, torch.ones(1, 1, 1), torch.ones(1, 1, 1),
            torch.ones(1, 1, dtype=torch.bool), delay=0, window=None,
        )  # fmt: skip
    assert stream.merged_key[0, 0, -1, 0].item() == pytest.approx(302 / 301, rel=1e-6)
    assert layer.entries().item() == 1


def test_nan_at_padding_does_not_leak():
    text = make_text(0, 8, [3], 1.0)
    text.key[:, :, :3] = math.nan
    text.value[:, :, :3] = math.nan
    stream = feed(FoldedLayer(), text, [0, 8], 0, None)
    assert stream.merged_key.isfinite().all() and stream.value.isfinite().all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_batch_operations_move_the_whole_state(operation, window):
    text = make_text(1, 24, [0, 5], 0.6)
    layer = FoldedLayer()
    feed(layer, text, [0, 12], 4, window)
    index = {"reorder": [1, 1], "repeat": [0, 0, 1, 1], "select": [1]}[operation]
    if operation == "reorder":
        layer.reorder_cache(torch.tensor(index))
    elif operation == "repeat":
        layer.batch_repeat_interleave(2)
    else:
        layer.batch_select_indices(torch.tensor(index))
    other = Text(*(x[index] for x in vars(text).values()))

    def check(stream, start, stop):
        for b in range(len(index)):
            row = stream.valid.shape[1] - 1
            got = as_rows(stream_rows(stream, b, 0, row, 4))
            torch.testing.assert_close(
                got, as_rows(expected_rows(other, b, 0, stop - 1, 4, window))
            )

    feed(layer, other, [12, 13, 20, 24], 4, window, check)


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
        feed(cache.layers[index], text, [0, 20], 4, window)
    cache.update(text.key[:, :, :20], text.value[:, :, :20], 1)
    return cache, text


def test_reset_equals_new():
    cache, text = filled()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes() == 0 and cache.compression_ratio() == 1.0
    stream = feed(cache.layers[0], text, [0, 10], 4, None)
    fresh = feed(FoldedLayer(), text, [0, 10], 4, None)
    torch.testing.assert_close(stream.merged_key, fresh.merged_key)
    assert stream.num_prefix == 0 and not stream.closed_mask.any()


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
    assert other.get_seq_length() == 20 and torch.equal(other.layers[1].keys, cache.layers[1].keys)
    for layer in (cache.layers[0], other.layers[0]):
        stream = feed(layer, text, [20, 30], 4, window)
        got = as_rows(stream_rows(stream, 1, 1, stream.valid.shape[1] - 1, 4))
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


def test_stored_slices_free_the_prompt():
    text = make_text(3, 600, [0], 1.0)
    layer = FoldedLayer()
    feed(layer, text, [0, 600], 4, None)
    held = sum(t.untyped_storage().nbytes() for t in layer.tensors().values())
    assert held < text.key.numel() * 8 / 10


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
    with pytest.raises(ValueError, match="delay=4"):
        layer.extend(*make_text(0, 1, [0, 0], 0).part(0, 1), delay=5, window=None)
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
    feed(cache.layers[0], text, [0, 20], 4, None)
    cache.update(text.key, text.value, 1)
    cache.save(tmp_path / "a.safetensors")
    other = FoldedCache(mixed, [0], delay=4).load(tmp_path / "a.safetensors")
    assert other.get_seq_length(1) == 20
    assert other.get_mask_sizes(1, 1) == cache.get_mask_sizes(1, 1)
    assert torch.equal(other.layers[1].keys, cache.layers[1].keys)
