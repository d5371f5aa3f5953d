"""What differs between model families: projections, norms, which layers attend to everything."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

SUPPORTED = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The attention module of every decoder layer, in order.

    Raises:
        ValueError: the family is not supported.
    """
    model_type = model.config.model_type
    if model_type not in SUPPORTED:
        raise ValueError(
            f"can't fold a {model_type!r} model; supported families: {', '.join(SUPPORTED)}. "
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
    if hasattr(attention, "qkv_proj"):
        sizes = [
            attention.config.num_attention_heads * attention.head_dim,
            attention.config.num_key_value_heads * attention.head_dim,
            attention.config.num_key_value_heads * attention.head_dim,
        ]
        parts = attention.qkv_proj(hidden_states).split(sizes, -1)
    else:
        parts = (
            attention.q_proj(hidden_states),
            attention.k_proj(hidden_states),
            attention.v_proj(hidden_states),
        )
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key, value


def softcap(attention: Any) -> float | None:
    """Tanh cap on the attention scores (Gemma 2), or None."""
    return getattr(attention, "attn_logit_softcapping", None)
