"""The attention mixin of a folded layer: project, decide, fold, attend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.attention.call import PagedCall, ParallelCall, StepCall
from cachefold.attention.dispatch import choose, tell
from cachefold.attention.pooling import running_means
from cachefold.cache import FoldedCache, FoldedLayer, Stream
from cachefold.cache.entries import PagedEntries
from cachefold.cache.stream import without_padding
from cachefold.core.decisions import Decisions, constrain, harden, relax
from cachefold.core.heads import pool_heads
from cachefold.core.merging import running_sizes, size_bias
from cachefold.core.rotary import rotate
from cachefold.core.tokens import Tokens
from cachefold.models import families
from cachefold.models.caches import check_goes_on, layer_of
from cachefold.models.evicting import EvictingAttention
from cachefold.models.masks import valid_tokens
from cachefold.models.run import FoldRun, check_options
from cachefold.policies.base import Decision, LearnedPolicy

HARD = FoldRun()


class FoldedAttention:
    """Mixin put before a family's attention class; keeps its parameters and state-dict keys."""

    policy: LearnedPolicy
    decision: Decision

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
        run = fold_run or HARD
        check_goes_on(run.mode, past_key_values)
        original = functools.partial(
            super().forward, hidden_states, position_embeddings=position_embeddings,
            attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        if run.mode == "dense":
            return original(past_key_values=past_key_values)
        check_options(kwargs)
        assert position_embeddings is not None
        told = position_embeddings, attention_mask, past_key_values
        return self._attend(hidden_states, *told, run, original)

    def _attend(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None, past_key_values: Any, run: FoldRun,
        original: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `forward`, in every mode but `dense`; `original` is the forward of the family."""
        batch, count = hidden_states.shape[:2]
        valid = valid_tokens(
            attention_mask, batch, count, hidden_states.device, check=self.checks_mask
        )
        query, key, value = families.project(self, hidden_states)
        key, value = (pool_heads(x, self.policy.kv_heads) for x in (key, value))
        layer = layer_of(past_key_values, self.policy, self.layer_idx)
        fresh = layer is None or layer.get_seq_length() == 0
        decided = self.decision(query, key, hidden_states, self._position(run))
        logits, omega = self.policy.share(*decided)
        alpha = self._alpha(logits, omega, run, valid if fresh else None)
        damp = Damping(self.decision.neuron, run.zero_out, key)
        size_weight = self.decision.size_weight
        size = None if size_weight is None else torch.ones_like(omega)
        tokens = Tokens(damp(key), value, *position_embeddings, alpha, omega, valid, size)
        if layer is not None and count == 1 and _can_step(layer, query, tokens, size_weight):
            padded, wanted = attention_mask is not None, past_key_values.backend
            tokens = without_padding(tokens) if padded else tokens
            run_step = functools.partial(self._step, query, tokens, damp, size_weight, wanted)
            return self._project_out(layer.step(tokens, run_step, padded)), None
        stream = None if layer is None else layer.extend(tokens, damp.factors, size_weight)
        # With nothing merged the folded form is plain attention: same kernel, same bits.
        plain = run.mode == "hard" and damp.factors is None and self.policy.kv_heads is None
        if fresh and plain and not bool(alpha.any()):
            return original(past_key_values=None)
        query = damp(rotate(damp(query), tokens.cos, tokens.sin))
        if stream is None:
            return self._project_out(self._whole_text(query, tokens, damp, run)), None
        return self._project_out(self._with_cache(query, stream, past_key_values, damp)), None

    def _position(self, run: FoldRun) -> float:
        """Of the dial; refuses to guess it."""
        if run.position is not None:
            return run.position
        if self.policy.max_cr is not None:
            raise ValueError(
                "this model has a dial, and no position of it arrived: model.forward(...) and "
                "model.model(...), compiled or not, go past what sets it. Call model(...), or pass "
                "fold_run=FoldRun(position=cachefold.models.dial.dial_position(model, cr=...))"
            )
        return 0.0

    def _alpha(self, logits: Tensor, omega: Tensor, run: FoldRun, valid: Tensor | None) -> Tensor:
        """(B, K, T) of the mode; with `valid` (B, T) the text starts here and is constrained."""
        if run.mode == "append":
            alpha = torch.zeros_like(logits)
        elif run.mode == "hard":
            alpha = harden(logits)
        else:
            alpha = relax(logits, temperature=run.temperature, method=run.relaxation)
        alpha = alpha if valid is None else constrain(alpha, valid)
        if run.recorder is not None:
            run.recorder[self.layer_idx] = Decisions(alpha, omega, logits)
        return alpha

    def _project_out(self, out: Tensor) -> Tensor:
        """(B, H, T, Dv) -> (B, T, hidden size)."""
        batch, _, count, _ = out.shape
        out = out if count == 1 else out.transpose(1, 2)
        return self.o_proj(out.reshape(batch, count, -1))

    def _step(
        self, query: Tensor, new: Tokens, damp: Damping, size_weight: Tensor | None, wanted: str,
        layer: FoldedLayer,
    ) -> Tensor:  # fmt: skip
        """One token after a cache: folds and attends in one call, (B, H, 1, Dv)."""
        closed, ring, tail, turn = layer.closed, layer.ring, layer.tail, layer.turn
        assert (
            isinstance(closed, PagedEntries)
            and ring is not None
            and tail is not None
            and turn is not None
        )
        call = StepCall(
            query=damp(query), new=new, ring=ring, turn=turn, tail=tail, pages=closed.pool.data,
            page_size=layer.page_size, table=closed.table, lengths=closed.lengths,
            scaling=self.scaling, softcap=families.softcap(self), factors=damp.factors,
            size_weight=None if size_weight is None else size_weight.detach(),
        )  # fmt: skip
        return choose(call, wanted).step(call)

    def _whole_text(self, query: Tensor, tokens: Tokens, damp: Damping, run: FoldRun) -> Tensor:
        """Without a cache: the text is all there is; (B, H, T, Dv)."""
        key, value = damp(rotate(tokens.key, tokens.cos, tokens.sin)), tokens.value
        merged_key, merged_value, merged_bias, delay = key, value, None, 0
        if run.mode != "append":
            mean_key, mean_value, _ = running_means(
                tokens.key, value, tokens.alpha, tokens.omega, self.policy.window
            )
            merged_key = damp(rotate(mean_key.to(key.dtype), tokens.cos, tokens.sin))
            merged_value, delay = mean_value.to(value.dtype), self.policy.delay
            if tokens.size is not None:
                merged_bias = self._bias(running_sizes(tokens.alpha, tokens.size))
        call = ParallelCall(
            query=query, exact_key=key, exact_value=value, merged_key=merged_key,
            merged_value=merged_value, merged_bias=merged_bias, alpha=tokens.alpha,
            valid=tokens.valid, delay=delay, scaling=self.scaling, softcap=families.softcap(self),
        )  # fmt: skip
        return choose(call).parallel(call)

    def _bias(self, sizes: Tensor | None) -> Tensor | None:
        """Bias on the scores of entries of these sizes, (B, K, N); None = 0."""
        weight = self.decision.size_weight
        return None if weight is None or sizes is None else size_bias(sizes, weight)

    def _with_cache(
        self, query: Tensor, stream: Stream, cache: FoldedCache, damp: Damping
    ) -> Tensor:
        """After a cache: the new tokens see what it held and one another; (B, H, T, Dv)."""
        exact, opened = stream.exact, stream.open
        call = PagedCall(
            query=query, pages=stream.pages, page_size=cache.page_size, table=stream.table,
            visible=stream.visible, open_key=damp(rotate(opened.key, opened.cos, opened.sin)),
            open_value=opened.value, open_bias=self._bias(opened.size), open_valid=opened.valid,
            exact_key=damp(rotate(exact.key, exact.cos, exact.sin)), exact_value=exact.value,
            exact_valid=exact.valid, delay=self.policy.delay, scaling=self.scaling,
            softcap=families.softcap(self),
        )  # fmt: skip
        return choose(call, cache.backend).attend(call)


class Damping:
    """Takes the channel that decides out of queries and keys, before RoPE and after it.

    RoPE mixes the channel with its partner, so one place would not do.

    Args:
        neuron: the channel; None changes nothing.
        factor: what is left of it, each time.
        like: (..., D) tensor of the right size, dtype and device.
    """

    def __init__(self, neuron: int | None, factor: float, like: Tensor) -> None:
        self.factors: Tensor | None = None
        if neuron is not None:
            self.factors = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
            self.factors[neuron] = factor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x if self.factors is None else x * self.factors


def _can_step(layer: FoldedLayer, query: Tensor, new: Tokens, size_weight: Tensor | None) -> bool:
    """Whether a token goes into the cache in place; tells what forbids it."""
    if layer.can_step:
        inputs = [query, new.key, new.value, new.omega]
        inputs += [] if size_weight is None else [size_weight]
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
    if layer.window not in (None, 1):
        tell(logging.INFO, "no steps in place: a window needs the tokens of the open entry")
    if layer.codec is not None:
        tell(logging.INFO, "no steps in place: packed entries are unpacked before attention")
    return False


def folded_layers(model: PreTrainedModel) -> list[int]:
    """Indices of the folded layers."""
    layers = families.attention_layers(model)
    mixins = (FoldedAttention, EvictingAttention)
    return [i for i, layer in enumerate(layers) if isinstance(layer, mixins)]
