"""Fold a model in place: swap the class of its attention layers, add decision modules."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from cachefold.attention import blocked, reference
from cachefold.cache import FoldedCache, FoldedLayer, Stream
from cachefold.core.decisions import RELAXATIONS, Decisions, constrain, harden, relax
from cachefold.core.merging import running_means
from cachefold.core.rotary import rotate
from cachefold.models import families
from cachefold.models.masks import valid_tokens
from cachefold.policies.dmc import DMC

logger = logging.getLogger(__name__)
_MODES = ("hard", "relaxed", "dense")


@dataclass(frozen=True, kw_only=True)
class FoldRun:
    """How one forward pass of a folded model decides; passed as `model(..., fold_run=...)`.

    >>> FoldRun(mode="relaxed").temperature
    0.3
    """

    mode: str = "hard"
    """`hard` (inference), `relaxed` (training) or `dense` (the original model)."""
    temperature: float = 0.3
    """Of the relaxation."""
    relaxation: str = "gumbel"
    """`gumbel`, `straight-through` or `sigmoid`."""
    zero_out: float = 0.0
    """Factor left on the decision neuron (zero-out stage); only for decision `neuron`."""
    recorder: dict[int, Decisions] | None = None
    """Filled with the decisions used, by layer index."""

    def __post_init__(self) -> None:
        """Checks values."""
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}; got {self.mode!r}")
        if self.relaxation not in RELAXATIONS:
            raise ValueError(
                f"relaxation must be one of {', '.join(RELAXATIONS)}; got {self.relaxation!r}"
            )


class FoldedAttention:
    """Mixin put before a family's attention class; keeps its parameters and state-dict keys."""

    policy: DMC
    decision: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        fold_run: FoldRun | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's forward, with keys and values folded as the policy decides."""
        run = fold_run or FoldRun()
        original = functools.partial(
            super().forward,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        if run.mode == "dense":
            return original(past_key_values=past_key_values)
        assert position_embeddings is not None
        batch, tokens = hidden_states.shape[:2]
        valid = valid_tokens(attention_mask, batch, tokens, hidden_states.device)
        projected, key, value = families.project(self, hidden_states)
        query, key, logits, omega = self.decision(projected, key, hidden_states, run.zero_out)
        logits, omega = self.policy.share(logits, omega)
        alpha = self._alpha(logits, run)
        layer = _folded_layer(past_key_values, self.layer_idx)
        fresh = layer is None or layer.get_seq_length() == 0
        if fresh:
            alpha = constrain(alpha, valid)
        if run.recorder is not None:
            run.recorder[self.layer_idx] = Decisions(alpha, omega, logits)
        call = _Call(query, key, value, *position_embeddings, alpha, omega, valid)
        stream = None if layer is None else self._extend(layer, call)
        # With nothing merged the folded form is plain attention: same kernel, same bits.
        if fresh and run.mode == "hard" and query is projected and not bool(alpha.any()):
            return original(past_key_values=None)
        out = self._attend(call, stream)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), None

    def _extend(self, layer: FoldedLayer, call: _Call) -> Stream:
        return layer.extend(
            call.key, call.value, call.cos, call.sin, call.alpha, call.omega, call.valid,
            delay=self.policy.delay, window=self.policy.window,
        )  # fmt: skip

    def _alpha(self, logits: Tensor, run: FoldRun) -> Tensor:
        if run.mode == "hard":
            return harden(logits)
        return relax(logits, temperature=run.temperature, method=run.relaxation)

    def _attend(self, call: _Call, stream: Stream | None) -> Tensor:
        """(B, H, T, D)."""
        rotated_query = rotate(call.query, call.cos, call.sin)
        options = {
            "delay": self.policy.delay,
            "scaling": self.scaling,
            "softcap": families.softcap(self),
        }
        if stream is None:
            keys, values, _ = running_means(
                call.key, call.value, call.alpha, call.omega, self.policy.window
            )
            return blocked.parallel(
                rotated_query, rotate(call.key, call.cos, call.sin), call.value,
                rotate(keys.to(call.key.dtype), call.cos, call.sin), values.to(call.value.dtype),
                call.alpha, valid=call.valid, **options,
            )  # fmt: skip
        return reference.parallel(
            rotated_query, rotate(stream.key, stream.cos, stream.sin), stream.value,
            rotate(stream.merged_key.to(call.key.dtype), stream.cos, stream.sin),
            stream.merged_value.to(call.value.dtype), stream.alpha, valid=stream.valid,
            closed_key=stream.closed_key, closed_value=stream.closed_value,
            closed_mask=stream.closed_mask, num_prefix=stream.num_prefix, **options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Call:
    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    alpha: Tensor
    omega: Tensor
    valid: Tensor


def _folded_layer(cache: Any, layer_idx: int) -> Any:
    if cache is None:
        return None
    if not isinstance(cache, FoldedCache):
        raise ValueError(
            f"a folded model needs a FoldedCache, got {type(cache).__name__}; leave "
            "past_key_values out, and generate() and forward() make one"
        )
    return cache.layers[layer_idx]


def fold(model: PreTrainedModel, policy: DMC) -> PreTrainedModel:
    """Folds a model in place: full-attention layers get decision modules and a folding cache.

    Args:
        model: a causal language model of a supported family.
        policy: what decides, for example `DMC(cr=2)`.

    Returns:
        The same model.

    Raises:
        ValueError: already folded, unsupported family, or no layer that can be folded.
    """
    if is_folded(model):
        raise ValueError("the model is folded already; call unfold(model) first")
    layers = families.attention_layers(model)
    full = [layer for layer in layers if families.is_full_attention(layer)]
    if not full:
        raise ValueError(
            f"no layer can be folded: all {len(layers)} layers use a sliding window, whose cache "
            "is bounded already"
        )
    if len(full) < len(layers):
        logger.warning(
            "%d of %d layers use a sliding window and stay dense; folding the other %d",
            len(layers) - len(full), len(layers), len(full),
        )  # fmt: skip
    for layer in full:
        _fold_layer(layer, policy)
    model.config.cachefold = policy.to_dict()
    state: Any = model
    state._cachefold_hook = model.register_forward_pre_hook(_supply_cache, with_kwargs=True)
    state.save_pretrained = _refuse_save
    return model


def _fold_layer(attention: Any, policy: DMC) -> None:
    config = attention.config
    base: Any = type(attention)
    attention.__class__ = _folded_class(base)
    attention.policy = policy
    weight = attention.o_proj.weight
    decision = policy.build_decision(config.hidden_size, config.num_key_value_heads)
    attention.decision = decision.to(weight.device)


@functools.cache
def _folded_class(base: type) -> type:
    return type("Folded" + base.__name__, (FoldedAttention, base), {"__module__": __name__})


def unfold(model: PreTrainedModel) -> PreTrainedModel:
    """Takes a fold back in place; the base weights were never changed by it.

    Raises:
        ValueError: the model is not folded.
    """
    if not is_folded(model):
        raise ValueError("the model is not folded")
    for attention in families.attention_layers(model):
        if isinstance(attention, FoldedAttention):
            attention.__class__ = type(attention).__bases__[1]
            del attention.decision, attention.policy
    state: Any = model
    state._cachefold_hook.remove()
    del state._cachefold_hook, state.config.cachefold, state.save_pretrained
    return model


@contextmanager
def folded(model: PreTrainedModel, policy: DMC) -> Iterator[PreTrainedModel]:
    """Folds a model for the length of a `with` block."""
    fold(model, policy)
    try:
        yield model
    finally:
        unfold(model)


def is_folded(model: PreTrainedModel) -> bool:
    """True between `fold` and `unfold`."""
    return hasattr(model, "_cachefold_hook")


def folded_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the folded layers."""
    layers = families.attention_layers(model)
    return [i for i, layer in enumerate(layers) if isinstance(layer, FoldedAttention)]


def new_cache(model: PreTrainedModel) -> FoldedCache:
    """An empty cache for a folded model."""
    layers = folded_layers(model)
    if not layers:
        raise ValueError("the model is not folded; call fold(model, policy) first")
    policy: DMC = families.attention_layers(model)[layers[0]].policy
    return FoldedCache(model.config, folded_layers=layers, delay=policy.delay, window=policy.window)


def _supply_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: a call that would start a dense cache gets a folded one."""
    run = kwargs.get("fold_run") or FoldRun()
    if run.mode == "dense":
        return None
    cache = kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        # Relaxed decisions are for training; only hard ones can be carried out in a cache.
        use_cache = kwargs["use_cache"] = model.config.use_cache and run.mode == "hard"
    is_unused = type(cache) is DynamicCache and cache.get_seq_length() == 0
    if use_cache and (cache is None or is_unused):
        kwargs["past_key_values"] = new_cache(model)
    return args, kwargs


def _refuse_save(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for save_pretrained: what that writes would load as a broken dense model."""
    raise ValueError(
        "save_pretrained would write a model that loads as a dense one; use "
        "cachefold.save_folded(model, folder, base=...), or unfold(model) first"
    )
