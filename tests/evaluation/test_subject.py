"""Scores, losses and texts of a model that works through its cache."""

from __future__ import annotations

import doctest
import logging

import pytest
import torch
from torch.nn import functional as F

from cachefold import DMC, H2O, TOVA, Random, Streaming, fold
from cachefold.evaluation import subject as module
from cachefold.evaluation.subject import Subject
from tests.evaluation.tiny import tiny_tokenizer
from tests.models.tiny import random_ids, scramble_decisions, tiny_model

LENGTHS = (40, 17, 64, 5, 33)


def folded_model(family: str = "Llama"):
    model = fold(tiny_model(family), DMC(delay=2))
    scramble_decisions(model)
    return model


def requests() -> list[tuple[list[int], list[int]]]:
    """Contexts of several lengths with continuations of one to three tokens."""
    found = []
    for seed, length in enumerate(LENGTHS):
        ids = random_ids(1, length, seed)[0].tolist()
        found += [(ids[:-3], ids[-3:]), (ids[:-3], [7]), (ids[:-1], [9]), (ids[:-3], [7])]
    return found


def plain_losses(model, ids):
    """Without a cache, without a batch."""
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="none").detach()


def test_doctests_run():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_dense_losses_are_those_of_a_plain_forward(family):
    model = tiny_model(family)
    texts = [random_ids(1, length, length)[0] for length in LENGTHS]
    subject = Subject(model, None)
    for ids, found in zip(texts, subject.losses(texts), strict=True):
        assert torch.allclose(found, plain_losses(model, ids), atol=1e-5)
    assert subject.footprint.cr == 1.0 == subject.footprint.bytes_ratio
    assert subject.footprint.tokens == sum(LENGTHS) - len(LENGTHS)


def test_folded_losses_are_those_of_the_parallel_form_and_compression_is_seen():
    model = folded_model()
    texts = [random_ids(1, length, length)[0] for length in LENGTHS]
    subject = Subject(model, None)
    found = subject.losses(texts)
    dense = Subject(tiny_model(), None).losses(texts)
    for ids, nats, other in zip(texts, found, dense, strict=True):
        assert torch.allclose(nats, plain_losses(model, ids), atol=1e-5)
        assert not torch.allclose(nats[8:], other[8:], atol=1e-4) or len(ids) < 10
    assert subject.footprint.cr > 1.3 and subject.footprint.bytes_ratio < 0.8


def test_footprints_are_those_of_the_cache():
    model, ids = folded_model(), random_ids(1, 50)
    subject = Subject(model, None)
    subject.losses([ids[0]])
    cache = model(ids[:, :-1]).past_key_values
    found = subject.footprint
    assert found.tokens == 49 and found.cr == pytest.approx(cache.compression_ratio())
    assert (found.cache_bytes, found.dense_bytes) == (cache.nbytes(), cache.dense_nbytes())


@pytest.mark.parametrize("kind", ["dense", "folded"])
@pytest.mark.parametrize("batch_size", [2, 3, "auto"])
def test_scores_and_footprints_do_not_depend_on_the_batch(kind, batch_size):
    model = tiny_model() if kind == "dense" else folded_model()
    alone, together = (
        Subject(model, None, batch_size=1),
        Subject(model, None, batch_size=batch_size),
    )
    for one, other in zip(alone.score(requests()), together.score(requests()), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert (one.greedy, one.tokens) == (other.greedy, other.tokens)
    assert alone.footprint.tokens == together.footprint.tokens
    assert alone.footprint.entries == pytest.approx(together.footprint.entries)
    assert alone.footprint.cache_bytes == together.footprint.cache_bytes


@pytest.mark.parametrize(
    ("policy", "codec"),
    [
        (TOVA(cr=2), None), (H2O(cr=2), None), (Streaming(budget=12), None), (Random(cr=2), None),
        (DMC(delay=2), "int4"), (TOVA(cr=2), "int4"), (H2O(cr=2), "int8"),
    ],
)  # fmt: skip
def test_every_policy_and_codec_scores_a_text_as_it_does_alone(policy, codec):
    model = fold(tiny_model(), policy)
    scramble_decisions(model)
    dense = Subject(tiny_model(), None).score(requests())
    alone, together = (Subject(model, None, batch_size=b, codec=codec) for b in (1, "auto"))
    found = together.score(requests())
    for one, other in zip(alone.score(requests()), found, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert any(abs(a.logprob - b.logprob) > 1e-3 for a, b in zip(dense, found, strict=True))
    assert together.footprint.cr == pytest.approx(alone.footprint.cr)
    assert together.footprint.cr > 1.2
    # These texts have hardly more tokens than a cache that evicts and packs has exact copies.
    if codec is None or isinstance(policy, DMC):
        assert together.footprint.bytes_ratio < 0.9


def test_the_codec_of_the_fold_is_used_and_fed_in_pieces():
    folded = Subject(fold(tiny_model(), DMC(), codec="int4"), None)
    named = Subject(fold(tiny_model(), DMC()), None, codec="int4")
    assert folded.codec == "int4" == named.settings()["codec"]
    assert folded.score(requests()) == named.score(requests())
    ids = random_ids(1, 65)[0]
    cache, losses = named._new_cache(), []
    for start in (0, 32):
        logits = named.model(ids[None, start : start + 32], past_key_values=cache).logits[0]
        losses.append(F.cross_entropy(logits, ids[start + 1 : start + 33], reduction="none"))
    assert torch.allclose(named.losses([ids])[0], torch.cat(losses), atol=1e-5)


def test_an_evicting_policy_with_a_codec_is_read_in_one_piece_as_in_many():
    model = fold(tiny_model(), TOVA(cr=2))
    subject = Subject(model, None, codec="int4")
    ids = random_ids(1, 121)[0]
    calls = []
    hook = model.register_forward_hook(lambda *call: calls.append(call[-1].logits.shape[1]))
    losses = subject.losses([ids])[0]
    hook.remove()
    assert calls == [120]
    cache, expected = subject._new_cache(), []
    for token, following in zip(ids[:-1], ids[1:], strict=True):
        logits = model(token[None, None], past_key_values=cache).logits[0]
        expected.append(F.cross_entropy(logits, following[None]))
    assert torch.allclose(losses, torch.stack(expected), atol=1e-4)


def test_pages_are_packed_at_the_same_tokens_whatever_the_batch():
    model = fold(tiny_model(), DMC(delay=2))
    texts = [random_ids(1, length, length)[0] for length in (120, 109, 120, 75)]
    alone, together = (Subject(model, None, batch_size=b, codec="int2") for b in (1, 4))
    for one, other in zip(alone.losses(texts), together.losses(texts), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert together.footprint.bytes_ratio < 0.7


def test_scores_sum_the_losses_of_the_continuation():
    subject = Subject(tiny_model(), None)
    ids = random_ids(1, 30)[0]
    [scored] = subject.score([(ids[:25].tolist(), ids[25:].tolist())])
    assert scored.logprob == pytest.approx(
        -plain_losses(tiny_model(), ids)[-5:].sum().item(), abs=1e-4
    )
    best = tiny_model()(ids[None, :25]).logits[0, -1].argmax().item()
    [greedy, other] = subject.score([(ids[:25].tolist(), [x]) for x in (best, (best + 1) % 64)])
    assert greedy.greedy and not other.greedy and greedy.logprob > other.logprob


def test_pieces_of_a_text_go_on_where_the_last_one_ended(monkeypatch):
    texts = [random_ids(1, length, length)[0] for length in LENGTHS]
    for model in (tiny_model(), folded_model()):
        whole = Subject(model, None).losses(texts)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK", 7)
            pieces = Subject(model, None).losses(texts)
            scores = Subject(model, None).score(requests())
        for one, other in zip(whole, pieces, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        for one, other in zip(Subject(model, None).score(requests()), scores, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_long_request_keeps_its_end_and_says_so(caplog):
    subject = Subject(tiny_model(), None, max_length=16)
    ids = random_ids(1, 40)[0].tolist()
    with caplog.at_level(logging.WARNING):
        [cut] = subject.score([(ids[:38], ids[38:])])
    assert "cut to its last 17" in caplog.text
    [short] = subject.score([(ids[23:38], ids[38:])])
    assert cut == short


@pytest.mark.parametrize("kind", ["dense", "folded"])
def test_generation_is_that_of_generate_for_any_batch(kind):
    model = tiny_model() if kind == "dense" else folded_model()
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer(eos_token=None)
    prompts = ["what is this", "a", "the quick brown fox jumps over the lazy dog"]
    texts = Subject(model, tokenizer).generate(prompts, max_new_tokens=12)
    assert texts == Subject(model, tokenizer, batch_size=1).generate(prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        full = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(full, skip_special_tokens=True)


def test_generation_stops_at_strings_and_end_tokens_and_frees_the_row():
    model, tokenizer = folded_model(), tiny_tokenizer(eos_token=None)
    model.generation_config.eos_token_id = None
    prompts = ["what is this", "a", "the quick brown fox jumps over the lazy dog"]
    full = Subject(model, tokenizer).generate(prompts, max_new_tokens=12)
    mark = full[0][4:6]
    stopped = Subject(model, tokenizer)
    texts = stopped.generate(prompts, max_new_tokens=12, stop=[mark])
    assert texts == [text.split(mark)[0] for text in full] and texts[0] != full[0]
    one = Subject(model, tokenizer, batch_size=1)
    one.generate(prompts, max_new_tokens=12, stop=[mark])
    assert stopped.footprint.tokens == one.footprint.tokens
    assert stopped.footprint.entries == pytest.approx(one.footprint.entries)
    assert stopped.footprint.cache_bytes == one.footprint.cache_bytes
    end = tokenizer(full[0][4])["input_ids"]
    model.generation_config.eos_token_id = end
    ended = Subject(model, tokenizer).generate(prompts[:1], max_new_tokens=12)
    assert ended == [full[0].split(full[0][4])[0]]


def test_pairs_are_tokenised_as_one_text():
    subject = Subject(tiny_model(), tiny_tokenizer())
    context, continuation = subject.encode_pair("ab ", "cd")
    assert subject.tokenizer.decode(context) == "ab"
    assert subject.tokenizer.decode(continuation) == " cd"
    with pytest.raises(ValueError, match="nothing to score"):
        subject.encode_pair(" ", "cd")


def test_a_first_token_that_the_text_has_is_not_put_there_again():
    class Begins:
        bos_token = "<s>"

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    subject = Subject(tiny_model(), Begins())
    assert subject.encode("ab")[0] == 1 and subject.encode("<s>ab")[0] == ord("<")


def test_settings_tell_weights_and_policies_apart():
    found = [Subject(model, None).settings() for model in (tiny_model(), tiny_model())]
    assert found[0] == found[1] and found[0]["policy"] is found[0]["position"] is None
    folded = Subject(folded_model(), None).settings()
    assert folded["policy"]["name"] == "dmc" and folded["weights"] != found[0]["weights"]


def test_wrong_options_and_requests_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="dense"):
        Subject(model, None, codec="int4")
    for options in ({"max_length": 1}, {"batch_size": 0}, {"batch_size": "most"}):
        with pytest.raises(ValueError, match="max_length|batch_size"):
            Subject(model, None, **options)
    subject = Subject(model, tiny_tokenizer(), max_length=8)
    with pytest.raises(ValueError, match="empty"):
        subject.score([([], [3])])
    with pytest.raises(ValueError, match="over max_length"):
        subject.score([([3], [3] * 9)])
    with pytest.raises(ValueError, match="2 to 8 tokens"):
        subject.losses([torch.ones(9, dtype=torch.int64)])
    with pytest.raises(ValueError, match="max_new_tokens"):
        subject.generate(["a"], max_new_tokens=8)
    with pytest.raises(ValueError, match="prompt is empty"):
        subject.generate([""], max_new_tokens=2)
