"""LoRA on the attention projections, by peft: add, switch off for a while, remove."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Adds LoRA (alpha = 2 * rank) to the attention projections, in place; freezes the base.

    Decision modules stay trainable. The class of the model does not change.

    Raises:
        ValueError: the model has adapters already.
    """
    check_unadapted(model)
    model.requires_grad_(False)
    fused = any(name.endswith("qkv_proj") for name, _ in model.named_modules())
    targets = ["qkv_proj", "o_proj"] if fused else ["q_proj", "k_proj", "v_proj", "o_proj"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if ".decision." in name or "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return model


def check_unadapted(model: PreTrainedModel) -> None:
    """Refuses a model with adapters, which new ones of the same name would take the place of.

    Raises:
        ValueError: it has some.
    """
    if adapted := adapted_modules(model):
        raise ValueError(
            f"the model has adapters already, on {len(adapted)} modules such as {min(adapted)}; "
            "merge or remove your adapters first (model = peft_model.merge_and_unload(), or "
            ".unload()), or load the base model without them"
        )


def lora_rank(model: PreTrainedModel) -> int:
    """Rank of the adapters; 0 without any."""
    ranks = [p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name]
    return ranks[0] if ranks else 0


def adapted_modules(model: PreTrainedModel) -> dict[str, Any]:
    """The modules that carry adapters, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def remove_lora(model: PreTrainedModel, keep: Collection[str] = ()) -> PreTrainedModel:
    """Puts the base layers back in place of their adapted ones; the base weights are untouched.

    Args:
        model: with or without adapters.
        keep: names of adapted modules to leave alone.
    """
    for name, module in adapted_modules(model).items():
        if name not in keep:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if not keep and hasattr(model, "peft_config"):
        del model.peft_config
    return model


def merge_lora(model: PreTrainedModel, keep: Collection[str] = ()) -> PreTrainedModel:
    """Adds the adapters into the weights of their base layers, in place, and takes them off.

    Equal up to rounding to the dtype of the weights. The base weights are lost.

    Args:
        model: with or without adapters.
        keep: names of adapted modules to leave alone.
    """
    for name, module in adapted_modules(model).items():
        if name not in keep:
            module.merge()
    return remove_lora(model, keep)


@contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Turns LoRA off for the length of a `with` block; with it off the base weights are alone.

    Afterwards every adapter is on or off and every parameter trainable or frozen as before.
    """
    layers = list(adapted_modules(model).values())
    were_off = [layer.disable_adapters for layer in layers]
    trainable = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield model
    finally:
        for layer, was_off in zip(layers, were_off, strict=True):
            if not was_off:
                layer.enable_adapters(True)
        # peft marks every active adapter trainable when it turns one on.
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def check_unmerged(model: PreTrainedModel, wish: str) -> None:
    """Refuses a model whose adapters are merged.

    Args:
        model: folded.
        wish: what it can't be any more.

    Raises:
        ValueError: they are merged.
    """
    state: Any = model
    if state._cachefold_merged:
        raise ValueError(
            f"the adapters are merged into the weights, so that the model can't be {wish}; load "
            "the base model again, and the artefact without merge=True"
        )
