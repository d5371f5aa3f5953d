"""Import of Megatron-LM checkpoints with DMC: the same logits and decisions, teaching refusals."""

from __future__ import annotations

import os
import random
import shutil
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch

from cachefold import DMC, FoldRun, fold, load_folded, save_folded
from cachefold.models.families import project
from cachefold.models.megatron import _config, read_checkpoint
from cachefold.models.megatron_files import load_rank
from tests.models.megatron import fused_rows, write_checkpoint
from tests.models.tiny import random_ids, tiny_model

POLICY = DMC(cr=8.0, delay=0, window=12, decision="neuron", neuron=-1)
PUBLISHED = {
    "_codecs.encode", "_io.BytesIO", "argparse.Namespace", "collections.OrderedDict",
    "megatron.core.enums.ModelType", "torch.BFloat16Storage", "torch._utils._rebuild_tensor_v2",
    "torch.bfloat16",
}  # fmt: skip
"""What the pickle of nvidia/Llama-2-7B-DMC-8x names, as its page on the hub lists it."""


def merging_model(**changes):
    """A tiny Llama whose last channel of the keys is spread around c = 5."""
    model = tiny_model(num_hidden_layers=4, **changes)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.unflatten(0, (-1, 8))[:, -1] *= 1e3
        torch.nn.init.normal_(layer.input_layernorm.weight, 1.0, 0.1)
        torch.nn.init.normal_(layer.post_attention_layernorm.weight, 1.0, 0.1)
    torch.nn.init.normal_(model.model.norm.weight, 1.0, 0.1)
    return model


def build(folder):
    return read_checkpoint(folder).build()


def outcome(model):
    """Logits and decisions on two texts of 40 tokens."""
    decisions = {}
    with torch.no_grad():
        logits = model(random_ids(2, 40), use_cache=False, fold_run=FoldRun(recorder=decisions))
    return logits.logits, decisions


@pytest.mark.parametrize(
    ("tensor", "pipeline", "published"),
    [(1, 1, True), (1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 4, False)],
)
def test_logits_and_decisions_are_those_of_the_model_it_was_made_of(
    tmp_path, tensor, pipeline, published
):
    original = merging_model()
    write_checkpoint(original, tmp_path, tensor=tensor, pipeline=pipeline, published=published)
    imported = build(tmp_path)
    assert imported.config.cachefold == POLICY.to_dict()
    expected, wanted = outcome(fold(original, POLICY))
    logits, decisions = outcome(imported)
    assert torch.equal(logits, expected)
    assert 0.2 < torch.stack([d.alpha.mean() for d in wanted.values()]).mean() < 0.8
    for layer, decision in wanted.items():
        assert torch.equal(decisions[layer].alpha, decision.alpha)
        assert torch.equal(decisions[layer].omega, decision.omega)
    ids = random_ids(1, 40)
    cache = imported(ids).past_key_values
    assert cache.compression_ratio() > 1.2


def test_the_fused_projection_splits_as_megatron_splits_it(tmp_path):
    original = merging_model()
    imported = build(write_checkpoint(original, tmp_path, tensor=2))
    states = torch.randn(1, 5, 32)
    mixed = states @ fused_rows(original.model.layers[1]).T
    # SelfAttention.get_query_key_value_tensors: (..., kv heads, (2 + 2) * 8), then split.
    parts = mixed.view(1, 5, 2, 32).split([16, 8, 8], dim=3)
    query, key, value = (part.reshape(1, 5, -1, 8).transpose(1, 2) for part in parts)
    for expected, actual in zip(
        (query, key, value), project(imported.model.layers[1].self_attn, states), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_the_artefact_loads_on_any_base_of_the_shape(tmp_path):
    imported = build(write_checkpoint(merging_model(), tmp_path / "checkpoint"))
    save_folded(imported, tmp_path / "artefact", base={"id": "tiny"})
    other = tiny_model(num_hidden_layers=4)
    assert torch.equal(outcome(load_folded(tmp_path / "artefact", other))[0], outcome(imported)[0])


def test_a_file_names_what_the_published_one_names(tmp_path):
    model = merging_model().to(torch.bfloat16)
    path = write_checkpoint(model, tmp_path, published=True) / "mp_rank_00/model_optim_rng.pt"
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert unsafe == {"_io.BytesIO", "argparse.Namespace", "megatron.core.enums.ModelType"}
    assert unsafe < PUBLISHED
    assert build(tmp_path).dtype == torch.bfloat16


def test_what_training_leaves_in_a_file_is_skipped(tmp_path):
    rng = {"np_rng_state": numpy.random.get_state(), "random_rng_state": random.getstate()}
    extra = {"rng_state": [rng], "optimizer": {"state": [torch.ones(3)]}}
    assert (
        read_checkpoint(write_checkpoint(merging_model(), tmp_path, extra=extra)).iteration == 2000
    )


def test_padded_vocabulary_ratio_and_window(tmp_path):
    model = merging_model()
    write_checkpoint(model, tmp_path, tensor=2, dmc_window_size=0, dmc_cr=4.0)
    checkpoint = read_checkpoint(tmp_path, cr=3, vocab_size=50)
    assert checkpoint.config.vocab_size == 50
    assert torch.equal(checkpoint.state()["lm_head.weight"], model.lm_head.weight[:50])
    assert (checkpoint.policy.cr, checkpoint.policy.window) == (3, None)
    with pytest.raises(ValueError, match=r"padded_vocab_size is 64, less than the 65 of the base"):
        read_checkpoint(tmp_path, vocab_size=65)


class Code:
    """A pickle of this would run a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    write_checkpoint(merging_model(), tmp_path, published=True, extra={"hidden": Code()})
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"model_optim_rng.pt.*weights_only=True.*\w+\.system"):
        read_checkpoint(tmp_path)


def rewrite(folder: Path, change, rank: str) -> None:
    """Changes the content of one rank; placeholders, which can't be saved, are left out."""
    path = folder / "iter_0002000" / rank / "model_optim_rng.pt"
    content = load_rank(path).content
    del content["args"].model_type
    content["model"] = {k: v for k, v in content["model"].items() if "_extra_state" not in k}
    change(content)
    torch.save(content, path.with_suffix(".new"))  # the tensors are views of the old file
    path.with_suffix(".new").replace(path)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """A checkpoint of 2 x 2 ranks."""
    folder = tmp_path_factory.mktemp("megatron")
    return write_checkpoint(merging_model(), folder, tensor=2, pipeline=2)


QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].pop(QKV), f"model has no '{QKV}'"),
        (lambda c: c["model"].update(bias=torch.ones(1)), "model has 'bias', which"),
        (lambda c: c["model"].update({QKV: None}), f"'{QKV}' is a NoneType"),
        (lambda c: c["model"].update({QKV: torch.ones(8, 32)}), rf"'{QKV}' is \(8, 32\), in "),
        (lambda c: c.pop("model"), "key 'model' is missing.*args, checkpoint_version, iteration"),
        (lambda c: c.update(args=3), "key 'args' is missing or no Namespace"),
        (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version 2.0; this import reads 3"),
        (lambda c: c.pop("checkpoint_version"), "checkpoint_version None; this"),
        (
            lambda c: setattr(c["args"], "tensor_model_parallel_size", 4),
            "args.tensor_model_parallel_size is 4, but there are files for 2",
        ),
    ],
)
def test_a_broken_rank_names_file_and_key(four_ranks, tmp_path, change, message):
    folder = shutil.copytree(four_ranks, tmp_path / "copy")
    rewrite(folder, change, "mp_rank_01_000")
    with pytest.raises(ValueError, match=rf"mp_rank_01_000.model_optim_rng.pt: {message}"):
        read_checkpoint(folder).state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "args.normalization is 'LayerNorm'.*it is 'RMSNorm'"),
        ({"rotary_percent": 0.5}, "args.rotary_percent is 0.5"),
        ({"dmc_init_val": 3.0}, "args.dmc_init_val is 3.0"),
        ({"dmc_is_stage_one": True}, "args.dmc_is_stage_one is True"),
        ({"num_layers": 6}, "holds 4 layers in 1 pipeline ranks, args.num_layers is 6"),
        ({"ffn_hidden_size": 64}, r"linear_fc2.weight', all ranks joined, is \(32, 48\)"),
        ({"num_query_groups": 4}, r"linear_qkv.weight', all ranks joined, is \(64, 32\)"),
        ({"dmc_cr": None}, "args.dmc_cr is missing, so .*--cr 8"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, message):
    write_checkpoint(merging_model(), tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path).state()


def test_a_missing_argument_is_named(tmp_path):
    write_checkpoint(merging_model(), tmp_path)
    rewrite(tmp_path, lambda content: delattr(content["args"], "ffn_hidden_size"), "mp_rank_00")
    with pytest.raises(ValueError, match="mp_rank_00.*args.ffn_hidden_size is missing"):
        read_checkpoint(tmp_path)


def _remove(name):
    return lambda folder: shutil.rmtree(folder / "iter_0002000" / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("mp_rank_01_001"), "mp_rank_01_001/model_optim_rng.pt is missing.*2 .* x 2"),
        (_remove("."), "names iter_0002000, and there is no folder"),
        (
            lambda f: (f / "iter_0002000/mp_rank_00_000_000").mkdir(),
            "mp_rank_00_000_000: a rank folder is named .*expert",
        ),
        (
            lambda f: (f / "latest_checkpointed_iteration.txt").write_text("new"),
            "must hold a number or the word release, got 'new'",
        ),
        (
            lambda f: (f / "latest_checkpointed_iteration.txt").unlink(),
            "neither mp_rank_XX folders nor latest_checkpointed_iteration.txt",
        ),
        (
            lambda f: [_remove(".")(f), (f / "iter_0002000").mkdir()],
            "iter_0002000 has no mp_rank_XX folders",
        ),
        (
            lambda f: [
                _remove(".")(f), (f / "iter_0002000").mkdir(),
                (f / "iter_0002000/__0_0.distcp").touch(),
            ],
            "is a distributed checkpoint .*--ckpt-convert-format torch",
        ),
        (
            lambda f: (f / "iter_0002000/mp_rank_00_000/model_optim_rng.pt").write_bytes(b"cut"),
            "can't read .*mp_rank_00_000/model_optim_rng.pt",
        ),
    ],
)  # fmt: skip
def test_missing_and_foreign_files(four_ranks, tmp_path, change, message):
    folder = shutil.copytree(four_ranks, tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_release_folders_are_found(tmp_path):
    write_checkpoint(merging_model(), tmp_path)
    (tmp_path / "iter_0002000").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert read_checkpoint(tmp_path).config.num_hidden_layers == 4


def test_a_padded_llama_2_is_cut_to_its_vocabulary(tmp_path):
    args = Namespace(
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
        max_position_embeddings=4096, padded_vocab_size=32256, dmc_cr=8,
    )  # fmt: skip
    for size, expected in ((None, 32000), (32128, 32128)):
        assert _config(args, tmp_path, size).vocab_size == expected
