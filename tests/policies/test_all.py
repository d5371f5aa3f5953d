"""What every policy promises, on a tiny Llama with random decisions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from cachefold import DMC, DMCC, DMS, GQA, Full, fold, get_policy, list_policies
from cachefold.models.fold import new_cache
from tests.models.test_step import CLOSE, feed
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

FREE = ("h2o", "tova", "streaming", "random")
LEARNED = {
    "full": Full(), "gqa": GQA(kv_heads=1), "gqa+dmc": DMC(delay=3, kv_heads=1),
    "dmc": DMC(delay=3), "dmc-c": DMCC(delay=3), "dms": DMS(delay=3),
    "dmc, proportional": DMC(delay=3, proportional=True),
}  # fmt: skip
POLICIES = LEARNED | {
    f"{name}, {option}={value}": get_policy(name, **{option: value})
    for name in FREE
    for option, value in (("budget", 24), ("cr", 2.0))
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
# Old entries stay under all of them: only what is older than 32 tokens is read packed.
PACKED = LEARNED | {
    "h2o": get_policy("h2o", budget=40), "tova": get_policy("tova", cr=1.5),
    "streaming": get_policy("streaming", budget=50), "random": get_policy("random", cr=1.5),
}  # fmt: skip
CODECS = ("bf16", "int8", "int2", "mixed")
every_packed_policy = pytest.mark.parametrize("policy", PACKED.values(), ids=PACKED)


def folded(policy, **changes):
    model = fold(tiny_model(**changes), policy)
    scramble_decisions(model)
    return model


def sensitive(policy):
    """One layer whose attention matters; rounding does not move a number to another grid point."""
    return folded(policy, num_hidden_layers=1, initializer_range=0.1).double()


def padded_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 40) ids and their mask; the first row is shorter."""
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    return random_ids(2, 40), mask


def test_no_policy_is_left_out():
    assert {policy.name for policy in POLICIES.values()} == set(list_policies())


@every_policy
def test_any_split_of_a_padded_text_gives_the_same(policy):
    model, (ids, mask) = folded(policy), padded_ids()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[:1, 7:], use_cache=False).logits
    torch.testing.assert_close(whole[:1, 7:], alone, **CLOSE)
    entries = []
    for bounds in ([0, 40], [0, 25, 26, 27, 40], [0, 5, 9, 39, 40], range(41)):
        cache = new_cache(model)
        got = feed(model, ids, bounds, cache, mask)
        torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], **CLOSE)
        entries.append([layer.tolist() for layer in cache.entries()])
    assert all(one == entries[0] for one in entries)


@every_policy
def test_memory_is_that_of_the_entries_kept(policy):
    """Heads are large beside what is counted of them; 40 channels have no kernel to compile."""
    model, ids = folded(policy, num_hidden_layers=1, head_dim=40), random_ids(2, 500)
    cache, sizes = new_cache(model), []
    for bounds in ([0, 100], [100, 300, 301, 302], [302, 499], [499, 500]):
        feed(model, ids, bounds, cache)
        sizes.append(cache.allocated_nbytes())
    assert policy == Full() or cache.compression_ratio() > 1.8
    assert sizes[-1] < 1.1 * cache.dense_nbytes() / cache.compression_ratio()
    if getattr(policy, "budget", None) is not None:
        assert max(sizes) < 1.01 * min(sizes)
    elif policy.name in FREE:
        assert cache.compression_ratio() == policy.cr
    cache.reset()
    assert cache.allocated_nbytes() == 0 and cache.get_seq_length() == 0


@every_policy
def test_files_copies_and_chosen_rows_go_on_as_the_whole_text(policy, tmp_path):
    model, (ids, mask) = folded(policy), padded_ids()
    whole = feed(model, ids, [0, 40], new_cache(model), mask)
    cache, rest = new_cache(model), [23, 24, 25, 40]
    feed(model, ids, [0, 20, 21, 22, 23], cache, mask)
    cache.save(tmp_path / "a.safetensors")
    loaded, chosen, fewer = new_cache(model), copy.deepcopy(cache), copy.deepcopy(cache)
    loaded.load(tmp_path / "a.safetensors")
    chosen.reorder_cache(torch.tensor([1, 1, 0]))
    fewer.batch_select_indices(torch.tensor([1]))
    for each, rows in ((cache, [0, 1]), (loaded, [0, 1]), (chosen, [1, 1, 0]), (fewer, [1])):
        got = feed(model, ids[rows], rest, each, mask[rows])
        torch.testing.assert_close(got, whole[rows, 23:], **CLOSE)


class Collector(pickle.Pickler):
    """Finds every tensor below what it is given, by walking it as for a file."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.nbytes: dict[int, int] = {}

    def persistent_id(self, found):
        if not isinstance(found, torch.Tensor):
            return None
        storage = found.untyped_storage()
        self.nbytes[storage.data_ptr()] = storage.nbytes()
        return "a tensor"


@pytest.mark.parametrize("codec", CODECS)
@every_packed_policy
def test_later_tokens_see_the_same_packed_entries_and_all_bytes_count(policy, codec):
    """Training-free policies show the same to all tokens, others exact entries to those at once."""
    model, ids = sensitive(policy), random_ids(2, 120)
    mask, results = torch.ones_like(ids), []
    mask[0, :7] = 0
    for bounds in ([0, 119, 120], [0, 50, 51, 52, 90, 119, 120], range(121)):
        cache, collector = new_cache(model, codec=codec), Collector()
        got = feed(model, ids, bounds, cache, mask)
        results.append(got[mask.bool()] if policy.name in FREE else got[:, -1])
        collector.dump(cache.layers)
        assert cache.allocated_nbytes() == sum(collector.nbytes.values())
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=0, atol=1e-5)


@every_packed_policy
def test_fewer_bits_lose_more(policy):
    model, ids = sensitive(policy), random_ids(1, 120)

    def logits(codec: str | None) -> torch.Tensor:
        return feed(model, ids, [0, *range(90, 121)], new_cache(model, codec=codec))[:, 90:]

    exact = logits(None)
    errors = {name: float((logits(name) - exact).norm() / exact.norm())
              for name in ("bf16", "int8", "int4", "int2")}  # fmt: skip
    assert 0 < errors["bf16"] < 0.002 and 0 < errors["int8"] < 0.004
    assert 5 * errors["int8"] < errors["int4"] and 2 * errors["int4"] < errors["int2"] < 0.2
