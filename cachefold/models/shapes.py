"""Shapes of well-known base models, so that plans and imports need neither weights nor network."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        **_LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "meta-llama/Llama-2-13b-hf": {
        **_LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "meta-llama/Llama-2-70b-hf": {
        **_LLAMA2, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Options of `LlamaConfig` by hub id; what is not named is transformers' default."""
_COMPARED = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings",
)  # fmt: skip
"""What the weights of one model need of another that is to run them."""


def known_shape(hub_id: str) -> PreTrainedConfig | None:
    """Config of a model of `SHAPES`; None for others.

    >>> known_shape("meta-llama/Llama-2-70b-hf").num_key_value_heads
    8
    """
    return LlamaConfig(**SHAPES[hub_id]) if hub_id in SHAPES else None


def name_of_shape(config: PreTrainedConfig) -> str | None:
    """Hub id of the known model with this shape, whatever its padded vocabulary; None for others.

    >>> name_of_shape(LlamaConfig(**SHAPES["meta-llama/Llama-2-7b-hf"]))
    'meta-llama/Llama-2-7b-hf'
    """
    for name, shape in SHAPES.items():
        if all(getattr(config, key) == shape[key] for key in shape if key != "vocab_size"):
            return name
    return None


def check_same_shape(config: PreTrainedConfig, base: PreTrainedConfig, name: str) -> None:
    """Refuses weights of one shape for a base model of another.

    Args:
        config: of the weights.
        base: of the base model.
        name: of the base model, for the message.

    Raises:
        ValueError: they differ; names the fields.

    >>> config = known_shape("meta-llama/Llama-2-7b-hf")
    >>> check_same_shape(config, LlamaConfig(vocab_size=32000, rms_norm_eps=1e-5), "mine")
    """
    pairs = ((key, getattr(config, key), getattr(base, key, None)) for key in _COMPARED)
    odd = [f"{key} {found} (base {wanted})" for key, found, wanted in pairs if found != wanted]
    if odd:
        raise ValueError(f"the weights don't fit base model {name}: {', '.join(odd)}")
