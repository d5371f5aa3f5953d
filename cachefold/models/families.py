"""What differs between model families: projections, norms, which layers attend to everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cachefold.core.names import closest

SUPPORTED = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
JOINED, JOINED_BIAS = "joined_weight", "joined_bias"
"""Buffers of an attention layer whose projections are laid into one."""


def check_model(model: Any) -> None:
    """Refuses what is no model of transformers, or wraps one.

    Raises:
        ValueError: it is not.
    """
    if isinstance(model, PreTrainedModel):
        return
    found = f"{type(model).__module__}.{type(model).__name__}"
    if hasattr(model, "get_base_model"):  # peft
        raise ValueError(
            f"{found} wraps a model; give the model in it, model.get_base_model(), and go on with "
            "either. Or fold first and wrap the folded model, which works as well"
        )
    raise ValueError(
        f"a transformers.PreTrainedModel is needed, such as AutoModelForCausalLM.from_pretrained "
        f"gives; got {found}. Of a wrapped model give the model in it"
    )


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The attention module of every decoder layer, in order.

    Raises:
        ValueError: the family is not supported.
    """
    model_type = model.config.model_type
    if model_type not in SUPPORTED:
        raise ValueError(
            f"can't fold a {model_type!r} model.{closest(model_type, SUPPORTED)} Supported "
            f"families: {', '.join(SUPPORTED)}. "
            "CONTRIBUTING.md says how to add one."
        )
    decoder: Any = model.get_decoder()
    return [layer.self_attn for layer in decoder.layers]


def is_full_attention(attention: Any) -> bool:
    """False for a sliding-window layer: its cache is bounded already and stays dense."""
    layer_type = getattr(attention, "layer_type", None)
    if layer_type is not None:
        return layer_type == "full_attention"
    return getattr(attention.config, "sliding_window", None) is None


def project(attention: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, T, D), key and value (B, K, T, D), normed where the family does, unrotated."""
    # Looked up in the dict: hasattr on a module is slow where the answer is no.
    modules = attention._modules
    if _is_joined(attention):
        weight, bias = attention._buffers[JOINED], attention._buffers[JOINED_BIAS]
        joined = functional.linear(hidden_states, weight, bias)
        parts = joined.split(_fused_sizes(attention), -1)
    elif "qkv_proj" in modules:
        parts = attention.qkv_proj(hidden_states).split(_fused_sizes(attention), -1)
    else:
        parts = (
            attention.q_proj(hidden_states),
            attention.k_proj(hidden_states),
            attention.v_proj(hidden_states),
        )
    batch, count = hidden_states.shape[:2]
    if count == 1:  # the same without a transpose, of which decoding would feel the price
        query, key, value = (part.view(batch, -1, 1, attention.head_dim) for part in parts)
    else:
        shape = (batch, count, -1, attention.head_dim)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
    if "q_norm" in modules:
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key, value


def join_projections(attention: Any) -> None:
    """Lays query, key and value weights into one, for `project` to read in one product.

    The separate weights and biases become views of it. Nothing happens to projections that are
    fused already, that carry adapters, or of which only some have a bias.
    """
    parts = [attention._modules.get(name) for name in _PROJECTIONS]
    if not all(type(part) is nn.Linear for part in parts):
        return
    linears: list[Any] = parts
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        return
    sizes = _fused_sizes(attention)
    bias = _laid_together(biases, sizes) if biases else None
    weight = _laid_together([linear.weight for linear in linears], sizes)
    attention.register_buffer(JOINED_BIAS, bias, persistent=False)
    attention.register_buffer(JOINED, weight, persistent=False)
    attention._joined_at = _addresses(attention)


def part_projections(attention: Any) -> None:
    """Undoes `join_projections`; every weight then has memory of its own."""
    if attention._buffers.pop(JOINED, None) is None:
        return
    del attention._buffers[JOINED_BIAS], attention._joined_at
    attention._non_persistent_buffers_set -= {JOINED, JOINED_BIAS}
    for name in _PROJECTIONS:
        for parameter in attention._modules[name].parameters():
            parameter.data = parameter.data.clone()


def _laid_together(parameters: list[Any], sizes: list[int]) -> Tensor:
    """Makes parameters views of one tensor, and returns it."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, view in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = view
    return whole


def _is_joined(attention: Any) -> bool:
    """Whether the joined weights are still those of the projections.

    Not once a projection was moved, cast, replaced or given an adapter, nor where its weight is
    being trained, nor in a compiled step, which can't look at addresses.
    """
    weight = attention._buffers.get(JOINED)
    if weight is None or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and attention._modules["q_proj"].weight.requires_grad:
        return False
    joined_at: list[int] = attention._joined_at
    return joined_at == _addresses(attention)


def _addresses(attention: Any) -> list[int]:
    """Where the weights of the projections lie; nothing where one is no plain linear layer."""
    parts = [attention._modules[name] for name in _PROJECTIONS]
    if not all(type(part) is nn.Linear for part in parts):
        return []
    return [part.weight.data_ptr() for part in parts]


def _fused_sizes(attention: Any) -> list[int]:
    """Rows of query, key and value in one fused projection."""
    heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    return [count * attention.head_dim for count in (heads, kv_heads, kv_heads)]


def query_key_rows(attention: Any) -> list[Tensor]:
    """Views on the weights and biases of the query and key projections, (heads * D, ...) each."""
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj
        parts = [p for p in (fused.weight, fused.bias) if p is not None]
        return [view for p in parts for view in p.split(_fused_sizes(attention), 0)[:2]]
    linears = (attention.q_proj, attention.k_proj)
    return [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]


def softcap(attention: Any) -> float | None:
    """Tanh cap on the attention scores (Gemma 2), or None."""
    return vars(attention).get("attn_logit_softcapping")
