"""Fold a model in place: swap the class of its attention layers, add decision modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cachefold.attention.dispatch import tell
from cachefold.cache.codecs import get_codec
from cachefold.core.dial import Dial
from cachefold.models import families
from cachefold.models.attention import FoldedAttention, folded_layers
from cachefold.models.evicting import EvictingAttention
from cachefold.models.generation import FoldedCausalLM, new_cache, supply_cache
from cachefold.models.lora import adapted_modules, check_unmerged, merge_lora, remove_lora
from cachefold.models.mixing import mix_in, mix_out
from cachefold.models.run import FoldRun
from cachefold.policies.base import LearnedPolicy, Policy
from cachefold.policies.budget import BudgetPolicy

__all__ = [
    "FoldRun",
    "FoldedAttention",
    "check_unmerged",
    "fold",
    "folded",
    "folded_layers",
    "is_folded",
    "merge_weights",
    "new_cache",
    "unfold",
    "zero_decision_neurons",
]

logger = logging.getLogger(__name__)


def fold(model: PreTrainedModel, policy: Policy, codec: str | None = None) -> PreTrainedModel:
    """Folds a model in place: full-attention layers get a cache that folds or evicts.

    A learned policy adds decision modules; one that learns nothing adds no parameters.

    Args:
        model: a causal language model of a supported family.
        policy: what decides, for example `DMC(cr=2)` or, without training, `TOVA(budget=512)`.
        codec: how its caches pack entries, a name of `cachefold ls codecs`; None = entries keep
            the dtype of the model. It is no part of what `save_folded` writes.

    Returns:
        The same model.

    Raises:
        ValueError: no model of transformers, already folded, unsupported family, a policy that
            doesn't fit, an unknown codec, layers that accelerate runs, or none that can be folded;
            the model is then unchanged.

    >>> from cachefold import DMC
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)
    >>> model = fold(LlamaForCausalLM(config).eval(), DMC(cr=2))
    >>> model(torch.tensor([[1, 2, 3]])).past_key_values.compression_ratio()  # fresh: no merge
    1.0
    """
    families.check_model(model)
    if is_folded(model):
        raise ValueError("the model is folded already; call unfold(model) first")
    if codec is not None:
        get_codec(codec)
    full = _foldable(model)
    decisions = [
        None if isinstance(policy, BudgetPolicy) else _build_decision(layer, policy)
        for layer in full
    ]
    state: Any = model
    state._cachefold_adapted = frozenset(adapted_modules(model))
    state._cachefold_loaded = frozenset()
    state._cachefold_policy, state._cachefold_codec = policy, codec
    state._cachefold_dial, state._cachefold_merged = Dial(), False
    state._cachefold_layers = [layer.layer_idx for layer in full]
    for layer, decision in zip(full, decisions, strict=True):
        mix_in(layer, EvictingAttention if decision is None else FoldedAttention)
        layer.policy = policy
        layer.checks_mask = layer is full[0]
        if decision is not None:
            layer.decision = decision
    model.config.cachefold = policy.to_dict()
    state._cachefold_hook = model.register_forward_pre_hook(supply_cache, with_kwargs=True)
    mix_in(model, FoldedCausalLM)
    return model


def _foldable(model: PreTrainedModel) -> list[Any]:
    """The attention layers to fold; says which stay dense, and what they will not heed."""
    layers = families.attention_layers(model)
    full = [layer for layer in layers if families.is_full_attention(layer)]
    if not full:
        raise ValueError(
            f"no layer can be folded: all {len(layers)} layers use a sliding window, whose cache "
            "is bounded already"
        )
    for layer in full:
        _refuse_hooked(layer)
    if len(full) < len(layers):
        logger.warning(
            "%d of %d layers use a sliding window and stay dense; folding the other %d",
            len(layers) - len(full), len(layers), len(full),
        )  # fmt: skip
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if dropout:
        tell(
            logging.WARNING,
            f"attention_dropout={dropout:g} is not applied in folded layers, in training either; "
            "model.config.attention_dropout = 0.0 says the same",
        )
    return full


def _refuse_hooked(layer: Any) -> None:
    """A `forward` on the instance hides that of its class, so that a class swap does nothing."""
    if "forward" in vars(layer):
        raise ValueError(
            f"attention layer {layer.layer_idx} has a forward of its own, as accelerate gives to "
            "a model loaded with device_map (and leaves behind when its hooks are removed); load "
            "the model anew without device_map and move it with model.to(device)"
        )


def _build_decision(layer: Any, policy: LearnedPolicy) -> nn.Module:
    config = layer.config
    kv_heads = policy.kv_heads or config.num_key_value_heads
    if config.num_key_value_heads % kv_heads:
        raise ValueError(
            f"kv_heads={kv_heads} doesn't divide the {config.num_key_value_heads} kv heads of the "
            "model, which are pooled in groups of equal size"
        )
    decision = policy.build_decision(config.hidden_size, kv_heads, layer.head_dim)
    return decision.to(layer.o_proj.weight.device)


def unfold(model: PreTrainedModel) -> PreTrainedModel:
    """Takes a fold back in place; the base weights are as they were.

    LoRA that came after the fold goes too, trained or not. What `add_lora` froze stays frozen.

    Raises:
        ValueError: the model is not folded, or its adapters are merged into the base weights.

    >>> from cachefold import DMC
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)
    >>> type(unfold(fold(LlamaForCausalLM(config), DMC()))).__name__
    'LlamaForCausalLM'
    """
    families.check_model(model)
    if not is_folded(model):
        raise ValueError("the model is not folded; there is nothing to take back")
    check_unmerged(model, "taken back")
    layers = families.attention_layers(model)
    folded_modules = [layers[index] for index in folded_layers(model)]
    for attention in folded_modules:
        _refuse_hooked(attention)
    state: Any = model
    remove_lora(model, keep=state._cachefold_adapted)
    for attention in folded_modules:
        families.part_projections(attention)
        if isinstance(attention, FoldedAttention):
            del attention.decision
        mix_out(attention)
        del attention.policy, attention.checks_mask
    state._cachefold_hook.remove()
    mix_out(model)
    del state._cachefold_hook, state._cachefold_adapted, state._cachefold_merged
    del state._cachefold_policy, state._cachefold_codec, state._cachefold_dial
    del state._cachefold_loaded, state._cachefold_layers
    del state.config.cachefold
    return model


def merge_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Lays adapters and projections of a folded model together, in place: decoding gets faster.

    Adapters are added into the weights; in half precision the sums round, as the weights themselves
    were rounded. The queries, keys and values of a layer then come from one product. For inference
    alone: with adapters the model can't be unfolded afterwards, saved as an artefact, or compared
    with its dense self. Move the model to its device and dtype before, not after.

    Raises:
        ValueError: the model is not folded.

    >>> from cachefold import DMC
    >>> from cachefold.models.lora import add_lora
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10))
    >>> model = merge_weights(add_lora(fold(model, DMC()), rank=2))
    >>> any("lora" in name for name, _ in model.named_parameters())
    False
    """
    if not is_folded(model):
        raise ValueError("the model is not folded; call fold(model, policy) first")
    state: Any = model
    own = adapted_modules(model).keys() - state._cachefold_adapted
    state._cachefold_merged = state._cachefold_merged or bool(own)
    merge_lora(model, keep=state._cachefold_adapted)
    layers = families.attention_layers(model)
    for index in folded_layers(model):
        families.join_projections(layers[index])
    return model


@contextmanager
def folded(
    model: PreTrainedModel, policy: Policy, codec: str | None = None
) -> Iterator[PreTrainedModel]:
    """Folds a model for the length of a `with` block; see `fold`.

    >>> from cachefold import DMC
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)
    >>> model = LlamaForCausalLM(config)
    >>> with folded(model, DMC()):
    ...     is_folded(model)
    True
    >>> is_folded(model)
    False
    """
    fold(model, policy, codec)
    try:
        yield model
    finally:
        unfold(model)


def is_folded(model: PreTrainedModel) -> bool:
    """True between `fold` and `unfold`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> is_folded(LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)))
    False
    """
    return isinstance(model, FoldedCausalLM)


def zero_decision_neurons(model: PreTrainedModel) -> PreTrainedModel:
    """Ends the zero-out stage: sets row n of every query and key head to 0, in place.

    From then on training moves the decisions from the paper's start, c alone. Where a family
    norms queries and keys, the other channels of a head grow by about 1 / (2 D) of themselves.

    Args:
        model: folded with decision `neuron`, without LoRA.

    Raises:
        ValueError: not folded, another decision, or adapters on the projections.
    """
    if not is_folded(model):
        raise ValueError("the model is not folded; call fold(model, policy) first")
    attentions = [families.attention_layers(model)[index] for index in folded_layers(model)]
    if any(getattr(attention.policy, "decision", None) != "neuron" for attention in attentions):
        raise ValueError('only decision "neuron" has neurons to zero; fold with it')
    if adapted_modules(model):
        raise ValueError(
            'decision "neuron" trains with full weights; unfold(model) removes the adapters'
        )
    for attention in attentions:
        for rows in families.query_key_rows(attention):
            with torch.no_grad():
                rows.unflatten(0, (-1, attention.head_dim))[:, attention.decision.neuron] = 0.0
    return model
