"""Writes a Hugging Face Llama as a checkpoint of Megatron-LM with DMC."""

from __future__ import annotations

import enum
import io
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn


def arguments(model: nn.Module, tensor: int = 1, pipeline: int = 1, **changes) -> Namespace:
    """What Megatron-LM keeps of its command line, as far as it matters."""
    config = model.config
    values = {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size, "kv_channels": config.head_dim,
        "num_attention_heads": config.num_attention_heads, "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads, "padded_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps, "rotary_base": 10000, "rotary_percent": 1.0,
        "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
        "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline,
        "params_dtype": torch.bfloat16, "dmc_init_val": 5.0, "dmc_window_size": 12, "dmc_cr": 8.0,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def fused_rows(layer: nn.Module) -> Tensor:
    """(K * (G + 2) * D, E): by kv head its queries, its key, its value."""
    attention, rows = layer.self_attn, []
    dim, kv_heads = attention.head_dim, attention.config.num_key_value_heads
    group = attention.config.num_attention_heads // kv_heads
    for head in range(kv_heads):
        for name, first, count in (("q", head * group, group), ("k", head, 1), ("v", head, 1)):
            weight = getattr(attention, f"{name}_proj").weight.detach()
            rows.append(weight[first * dim : (first + count) * dim])
    return torch.cat(rows)


def rank_weights(
    model: nn.Module, tensor: int, rank: int, layers: range, first: bool, last: bool
) -> OrderedDict[str, object]:
    """`model` of one rank that holds `layers`."""

    def part(weight: Tensor, dim: int = 0) -> Tensor:
        return weight.detach().chunk(tensor, dim)[rank].clone()

    state: OrderedDict[str, object] = OrderedDict()
    if first:
        state["embedding.word_embeddings.weight"] = part(model.model.embed_tokens.weight)
    for index, number in enumerate(layers):
        layer, prefix = model.model.layers[number], f"decoder.layers.{index}."
        attention, mlp = prefix + "self_attention.", prefix + "mlp."
        gate, up = part(layer.mlp.gate_proj.weight), part(layer.mlp.up_proj.weight)
        state[attention + "linear_proj.weight"] = part(layer.self_attn.o_proj.weight, 1)
        state[attention + "linear_proj._extra_state"] = io.BytesIO(b"\xff\x00")
        state[attention + "linear_qkv.layer_norm_weight"] = layer.input_layernorm.weight.detach()
        state[attention + "linear_qkv.weight"] = part(fused_rows(layer))
        state[attention + "linear_qkv._extra_state"] = None
        state[mlp + "linear_fc1.layer_norm_weight"] = layer.post_attention_layernorm.weight.detach()
        state[mlp + "linear_fc1.weight"] = torch.cat([gate, up])
        state[mlp + "linear_fc2.weight"] = part(layer.mlp.down_proj.weight, 1)
    if last:
        state["decoder.final_layernorm.weight"] = model.model.norm.weight.detach()
        state["output_layer.weight"] = part(model.lm_head.weight)
    return state


def write_checkpoint(
    model: nn.Module, folder: Path, *, tensor: int = 1, pipeline: int = 1, published: bool = False,
    extra: dict[str, object] | None = None, **changes,
) -> Path:  # fmt: skip
    """Writes a checkpoint of iteration 2000; `published` as on the hub, else as Megatron-LM does.

    `extra` goes beside `model` in every file; `changes` are of `args`.
    """
    count = model.config.num_hidden_layers // pipeline
    target = folder if published else folder / "iter_0002000"
    for stage in range(pipeline):
        layers = range(stage * count, (stage + 1) * count)
        for rank in range(tensor):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            args = arguments(model, tensor, pipeline, **changes)
            weights = rank_weights(model, tensor, rank, layers, stage == 0, stage == pipeline - 1)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 2000, "model": weights}
            (target / name).mkdir(parents=True)
            save(content | (extra or {}), target / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("2000")
    return folder


def save(content: dict[str, object], path: Path) -> None:
    """Saves a rank with `args.model_type` of a class that is gone when the file is read."""
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core")}
    modules["megatron.core.enums"] = enums = types.ModuleType("megatron.core.enums")
    enums.ModelType = enum.Enum("ModelType", ["encoder_or_decoder"], module=enums.__name__)
    content["args"].model_type = enums.ModelType.encoder_or_decoder
    with mock.patch.dict(sys.modules, modules):
        torch.save(content, path)
