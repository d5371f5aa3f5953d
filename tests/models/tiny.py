"""Tiny random models of every supported family."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRA = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {"partial_rotary_factor": 0.5},
    "Gemma2": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3Text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
_SHARP = {
    "Gemma2": {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 2},
    "Gemma3Text": {"query_pre_attn_scalar": 2},
}
"""Of the families whose scores have a scale or a cap of their own."""
FAMILIES = sorted(_EXTRA)


def tiny_model(family: str = "Llama", **changes) -> nn.Module:
    """A 2-layer model in float32 eval mode; the same weights at every call."""
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **_EXTRA[family], **changes})
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def sharp_model(family: str) -> nn.Module:
    """A model of which each detail of attention shows in the logits.

    Large weights, so that attention is far from uniform; norms and biases that are no ones and
    zeros; for Gemma a scale of its own, and for Gemma 2 a cap that bends most scores.
    """
    model = tiny_model(family, initializer_range=0.25, **_SHARP.get(family, {}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a test fails that loads a model or a tokenizer."""
    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))


def scramble_decisions(model: nn.Module, seed: int = 1) -> None:
    """Random decision weights, so that heads merge about half of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".decision." in name:
            scale = 0.3 if name.endswith("weight") else 0.05
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(batch, tokens) ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, tokens), generator=generator)
