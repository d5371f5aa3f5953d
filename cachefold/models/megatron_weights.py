"""Weights of the ranks of a Megatron-LM checkpoint, joined and named as in a Hugging Face Llama.

Legend: E hidden size, K kv heads, G query heads per kv head, D head dim, F feed-forward size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cachefold.core.names import closest
from cachefold.models.megatron_files import RankFile

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_PLAIN = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", None),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight", None),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
}
"""Weights of a layer that only have to be joined: new name, dim (None = the same in all ranks)."""
_QKV, _GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_EMBEDDING, _NORM, _HEAD = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


def join_stages(stages: Sequence[Sequence[RankFile]], config: LlamaConfig) -> dict[str, Tensor]:
    """Joins all ranks.

    Args:
        stages: for every pipeline rank the files of its tensor-parallel ranks.
        config: of the Llama model; embeddings are cut to its vocabulary.

    Returns:
        Weights by the parameter names of `LlamaForCausalLM`.

    Raises:
        ValueError: missing or odd names, or another shape than the config says.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    state: dict[str, Tensor] = {}
    offset = 0
    for index, stage in enumerate(stages):
        joiner = _Joiner(stage, config, shapes, state)
        offset += joiner.join(offset, first=index == 0, last=index == len(stages) - 1)
    if offset != config.num_hidden_layers:
        raise ValueError(
            f"{stages[0][0].path.parent.parent} holds {offset} layers in {len(stages)} pipeline "
            f"ranks, args.num_layers is {config.num_hidden_layers}"
        )
    return state


class _Joiner:
    """Joins the tensor-parallel ranks of one pipeline stage into `state`."""

    def __init__(
        self,
        ranks: Sequence[RankFile],
        config: LlamaConfig,
        shapes: dict[str, torch.Size],
        state: dict[str, Tensor],
    ) -> None:
        self.ranks, self.shapes, self.state = ranks, shapes, state
        self.config: Any = config  # its fields are optional only before it is made

    def join(self, offset: int, *, first: bool, last: bool) -> int:
        """Joins everything; layers of the model start at `offset`. Returns their number."""
        found = (_LAYER.match(name) for name in self.ranks[0].content["model"])
        layers = 1 + max((int(match[1]) for match in found if match), default=-1)
        self._check_names(layers, first, last)
        vocabulary = self.config.vocab_size
        if first:
            self._put(
                _EMBEDDING, "model.embed_tokens.weight", self._cat(_EMBEDDING, 0)[:vocabulary]
            )
        for layer in range(layers):
            self._join_layer(f"decoder.layers.{layer}.", f"model.layers.{offset + layer}.")
        if last:
            self._put(_NORM, "model.norm.weight", self._cat(_NORM, None))
            if not self.config.tie_word_embeddings:
                self._put(_HEAD, "lm_head.weight", self._cat(_HEAD, 0)[:vocabulary])
        return layers

    def _join_layer(self, source: str, target: str) -> None:
        for name, (new, dim) in _PLAIN.items():
            self._put(source + name, target + new, self._cat(source + name, dim))
        kv_heads, dim = self.config.num_key_value_heads, self.config.head_dim
        group = self.config.num_attention_heads // kv_heads
        fused = self._cat(source + _QKV, 0)  # (K * (G + 2) * D, E)
        if fused.shape[0] != kv_heads * (group + 2) * dim:
            raise self._shape(source + _QKV, fused, (kv_heads * (group + 2) * dim, fused.shape[-1]))
        rows = fused.unflatten(0, (kv_heads, group + 2, dim))
        parts = {"q": rows[:, :group], "k": rows[:, group], "v": rows[:, group + 1]}
        for letter, part in parts.items():
            weight = part.reshape(-1, fused.shape[-1])
            self._put(source + _QKV, f"{target}self_attn.{letter}_proj.weight", weight)
        halves = [rank.chunk(2) for rank in self._parts(source + _GATE_UP)]  # (F / ranks, E) each
        for index, new in enumerate(("gate_proj", "up_proj")):
            weight = torch.cat([half[index] for half in halves])
            self._put(source + _GATE_UP, f"{target}mlp.{new}.weight", weight)

    def _check_names(self, layers: int, first: bool, last: bool) -> None:
        """All ranks must have the names of this stage and no others."""
        ends = [_NORM, *([] if self.config.tie_word_embeddings else [_HEAD])]
        expected = {
            *([_EMBEDDING] if first else []),
            *(ends if last else []),
            *(
                f"decoder.layers.{layer}.{name}"
                for layer in range(layers)
                for name in (*_PLAIN, _QKV, _GATE_UP)
            ),
        }
        for rank in self.ranks:
            names = {n for n in rank.content["model"] if not n.endswith("_extra_state")}
            for missing in sorted(expected - names):
                raise ValueError(
                    f"{rank.path}: model has no {missing!r}.{closest(missing, sorted(names))} The "
                    "import reads Megatron-Core with --transformer-impl transformer_engine"
                )
            for odd in sorted(names - expected):
                raise ValueError(
                    f"{rank.path}: model has {odd!r}, which this pipeline stage of a Llama model "
                    "with DMC does not have"
                )
            self._check_alike(rank, expected)

    def _check_alike(self, rank: RankFile, names: set[str]) -> None:
        """Every rank holds tensors of the shape of the first."""
        for name in sorted(names):
            tensor, first = (r.content["model"][name] for r in (rank, self.ranks[0]))
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{rank.path}: {name!r} is a {type(tensor).__name__}, no tensor")
            if tensor.shape != first.shape:
                raise ValueError(
                    f"{rank.path}: {name!r} is {tuple(tensor.shape)}, in {self.ranks[0].path} it "
                    f"is {tuple(first.shape)}"
                )

    def _parts(self, name: str) -> list[Tensor]:
        return [rank.content["model"][name] for rank in self.ranks]

    def _cat(self, name: str, dim: int | None) -> Tensor:
        parts = self._parts(name)
        return parts[0].clone() if dim is None else torch.cat(parts, dim)  # no view of a file

    def _put(self, name: str, new: str, weight: Tensor) -> None:
        if weight.shape != self.shapes[new]:
            raise self._shape(name, weight, tuple(self.shapes[new]))
        self.state[new] = weight.contiguous()

    def _shape(self, name: str, found: Tensor, wanted: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"{self.ranks[0].path}: {name!r}, all ranks joined, is {tuple(found.shape)}; by its "
            f"args it should be {wanted}"
        )
