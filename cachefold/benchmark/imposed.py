"""Whole models at an imposed compression ratio: decisions and caches that no training made.

A prefill gets decisions drawn beforehand. A decode starts from a cache filled with random
entries of the right lengths, so that no prompt of the full length has to be read; the dense
caches it is compared with are filled in the same way.

Legend: B batch, K kv heads, T tokens, D key dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from cachefold.benchmark.synthetic import Shape, merges, ragged_lengths
from cachefold.cache import FoldedCache
from cachefold.models import families
from cachefold.models.fold import folded_layers, new_cache

MERGE_LOGIT = 4.0


class ImposedDecision(nn.Module):
    """Does the work of a decision module, then takes the merges from a table.

    Args:
        inner: the module it stands for; its importance weights are used.
        table: (B, K, T) bool, True = merge, of the tokens in the order in which they come.
        device: of the model.
    """

    def __init__(self, inner: nn.Module, table: Tensor, device: torch.device) -> None:
        super().__init__()
        self.inner = inner
        self.neuron = inner.neuron
        self.logits = torch.where(table, MERGE_LOGIT, -MERGE_LOGIT).to(device)
        self.taken = 0

    @property
    def size_weight(self) -> Tensor | None:
        """(K,); see `policies.base.Decision`."""
        inner: Any = self.inner
        weight: Tensor | None = inner.size_weight
        return weight

    def forward(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Decides; see `policies.base.Decision`."""
        _, omega = self.inner(query, key, hidden_states, position)
        start, self.taken = self.taken, self.taken + key.shape[2]
        assert self.taken <= self.logits.shape[2], "more tokens than decisions were drawn for"
        return self.logits[:, :, start : self.taken], omega


class Imposition:
    """Decisions for one cache of a folded model.

    Args:
        model: folded.
        lengths: closed entries of every head after `tokens` tokens, (B, K) for each folded layer.
        tokens: T, of the prefill.
        more: tokens that follow.
        cr: imposed on what follows.
        seed: of the decisions.
    """

    def __init__(
        self, model: Any, lengths: list[Tensor], tokens: int, more: int, cr: float, seed: int
    ) -> None:
        layers = families.attention_layers(model)
        self._layers = [layers[index] for index in folded_layers(model)]
        self._decisions = []
        generator = torch.Generator().manual_seed(seed)
        for layer, closed in zip(self._layers, lengths, strict=True):
            table = merges(closed, tokens, more, cr, layer.policy.delay, generator)
            self._decisions.append(ImposedDecision(layer.decision, table, model.device))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Puts the decisions on the layers of the model, and the model's own back."""
        try:
            for layer, decision in zip(self._layers, self._decisions, strict=True):
                layer.decision = decision
            yield
        finally:
            for layer, decision in zip(self._layers, self._decisions, strict=True):
                layer.decision = decision.inner

    def restart(self) -> None:
        """Back to the first token."""
        for decision in self._decisions:
            decision.taken = 0


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, to fold one of them.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10))
    >>> twin = dense_twin(model)
    >>> twin is model, twin.lm_head.weight is model.lm_head.weight
    (False, True)
    """
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def layer_lengths(
    model: Any, shape: Shape, batch: int, tokens: int, cr: float, seed: int
) -> list[Tensor]:
    """Closed entries of every head after `tokens` tokens, (B, K) for each folded layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ragged_lengths(batch, shape.kv_heads, tokens, cr, shape.delay, generator)
        for _ in folded_layers(model)
    ]


def filled_cache(
    model: Any, shape: Shape, batch: int, tokens: int, cr: float, more: int,
    *, backend: str = "auto", seed: int = 0,
) -> tuple[FoldedCache, Imposition]:  # fmt: skip
    """A cache as after `tokens` tokens at `cr`, and the decisions for `more` tokens.

    The last tokens are read by the model, so that ring and open entry are real; the closed
    entries are random.

    Args:
        model: folded.
        shape: of its layers.
        batch: B.
        tokens: T.
        cr: imposed, ring and open entry included.
        more: tokens that follow.
        backend: of attention.
        seed: of everything random.

    >>> from cachefold import DMC, fold
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...     vocab_size=10)
    >>> model = fold(LlamaForCausalLM(config), DMC())
    >>> cache, imposition = filled_cache(model, Shape.of(config), 2, 128, 4.0, more=8)
    >>> cache.get_seq_length(), cache.compression_ratio()
    (128, 4.0)
    """
    cache = new_cache(model, backend=backend)
    first = shape.delay + 1  # the first token opens an entry, and none closes
    lengths = layer_lengths(model, shape, batch, tokens, cr, seed)
    opening = [torch.zeros_like(closed) for closed in lengths]
    imposition = Imposition(model, opening, first, more, cr, seed)
    positions = torch.arange(tokens - first, tokens, device=model.device)[None]
    with torch.no_grad(), imposition.active():
        model(
            random_ids(model, batch, first, seed), past_key_values=cache, position_ids=positions,
            logits_to_keep=1,
        )  # fmt: skip
    block = random_block(model, shape, batch, tokens, seed)
    for layer, closed in zip(_folded(cache), lengths, strict=True):
        column = torch.arange(int(closed.max()))
        new = (column < closed[..., None]).to(model.device)
        rows = block.flatten(0, 2)[: int(closed.sum())]
        bias = rows.new_zeros(len(rows), int(layer.has_sizes))
        layer.closed.append(new, torch.cat([rows, bias], -1), rows)
        layer.seen += tokens - first
        layer.valid_seen = layer.valid_seen + (tokens - first)
    others = set(range(len(cache.layers))) - set(cache.folded_layers)
    for index in sorted(others):
        part = block[:, :, : tokens - first]
        cache.update(part, part, index)
    return cache, imposition


def _folded(cache: FoldedCache) -> list[Any]:
    return [cache.layers[index] for index in cache.folded_layers]


def fill_dense(cache: Cache, model: Any, shape: Shape, batch: int, tokens: int, seed: int) -> None:
    """Fills every layer of a transformers cache with random keys and values."""
    block = random_block(model, shape, batch, tokens, seed)
    for index in range(len(families.attention_layers(model))):
        cache.update(block, block, index)


def random_block(model: Any, shape: Shape, batch: int, tokens: int, seed: int) -> Tensor:
    """(B, K, T, D) in the dtype of the model; the same for keys, values and all layers."""
    generator = torch.Generator(model.device).manual_seed(seed)
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    return torch.randn(size, generator=generator, dtype=model.dtype, device=model.device)


def random_ids(model: Any, batch: int, tokens: int, seed: int) -> Tensor:
    """(B, T) token ids."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(model.device)
