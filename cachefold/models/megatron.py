"""Import of DMC checkpoints of Megatron-LM, such as nvidia/Llama-2-7B-DMC-8x.

The format, as read in branch `dmc` of NVIDIA/Megatron-LM (commit d36bf8d) and on the pages of the
published files; no published file itself has been imported yet.

- Published: `mp_rank_00/model_optim_rng.pt` and `latest_checkpointed_iteration.txt`, one rank,
  bfloat16. Megatron-LM writes the same into `iter_XXXXXXX/` or `release/`, a folder for each
  tensor rank TT and, with more than one pipeline stage, stage PPP: `mp_rank_TT_PPP`.
- A file holds `args` (argparse.Namespace), `checkpoint_version` 3.0, `iteration` and `model`.
- Names are those of Megatron-Core with Transformer Engine; layers count from 0 in every stage.
- Rows of `linear_qkv` go by kv head: its query heads, its key, its value. Rows of `linear_fc1` of
  one rank: its part of gate, then its part of up. Rotary halves are as in Hugging Face models.
- The last channel decides: k[-1] - 5 > 0 merges, sigmoid(q[-1] + 5) + eps weighs, both leave
  attention; an entry averages its newest 12 tokens; delay 0 (`DMC(decision="neuron", ...)`).

Not verified: that `args` of the published files have the names of the released code (`dmc_cr`,
`dmc_window_size`); where they are missing, defaults of that code are taken, and cr must be given.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cachefold.models.fold import fold
from cachefold.models.megatron_files import RankFile, find_ranks, load_rank
from cachefold.models.megatron_weights import join_stages
from cachefold.models.shapes import known_shape, name_of_shape
from cachefold.policies.decisions import NEURON_OFFSET
from cachefold.policies.dmc import DMC

VERSION = 3.0
WINDOW = 12
_FIXED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "apply_layernorm_1p": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "num_experts": None,
    "virtual_pipeline_model_parallel_size": None,
    "dmc_init_val": NEURON_OFFSET,
    "dmc_is_stage_one": False,
}
"""Values of `args` that the import understands; one that is missing is taken to be this."""


@dataclass(frozen=True, slots=True)
class MegatronCheckpoint:
    """A checkpoint whose weights are still in its files.

    Attributes:
        stages: for every pipeline rank the files of its tensor-parallel ranks.
        config: of the Llama model.
        policy: what decides.
        iteration: optimiser steps of its last training stage.
    """

    stages: Sequence[Sequence[RankFile]]
    config: LlamaConfig
    policy: DMC
    iteration: int

    def state(self) -> dict[str, Tensor]:
        """Joins the weights, by parameter name of `LlamaForCausalLM`.

        Raises:
            ValueError: missing or odd weights; names file and key.
        """
        return join_stages(self.stages, self.config)

    def build(self) -> PreTrainedModel:
        """Makes the folded model, in the dtype of the checkpoint and in eval mode.

        `save_folded` writes all its weights, as they differ from those of the base.

        Raises:
            ValueError: as `state`.
        """
        state = self.state()
        model = LlamaForCausalLM.from_pretrained(
            None, config=self.config, state_dict=state, dtype=state["model.norm.weight"].dtype
        )
        return fold(model, self.policy).eval()


def read_checkpoint(
    folder: str | Path, *, cr: float | None = None, vocab_size: int | None = None
) -> MegatronCheckpoint:
    """Opens a checkpoint of any number of tensor and pipeline ranks.

    Args:
        folder: see `megatron_files.find_ranks`.
        cr: ratio it was trained for; None = what the checkpoint says.
        vocab_size: rows of the embeddings that are no padding; None = those of Llama 2 for a
            model of its shape, else all.

    Raises:
        ValueError: no such checkpoint, a pickle that names code, another version or architecture;
            the message names file and key.

    >>> read_checkpoint("nowhere")
    Traceback (most recent call last):
    ...
    ValueError: no folder nowhere; give the folder that holds latest_checkpointed_iteration.txt
    """
    stages = [[load_rank(path) for path in stage] for stage in find_ranks(folder)]
    for stage in stages:
        for rank in stage:
            _check_rank(rank, len(stages), len(stage))
    first = stages[0][0]
    args: Namespace = first.content["args"]
    config, policy = _config(args, first.path, vocab_size), _policy(args, first.path, cr)
    return MegatronCheckpoint(stages, config, policy, int(first.content.get("iteration", 0)))


def _check_rank(rank: RankFile, pipeline: int, tensor: int) -> None:
    """Checks version, keys and the number of ranks of one file."""
    for key, kind in (("args", Namespace), ("model", dict)):
        if not isinstance(rank.content.get(key), kind):
            raise ValueError(
                f"{rank.path}: key {key!r} is missing or no {kind.__name__}; found "
                f"{', '.join(map(str, rank.content))}"
            )
    version = rank.content.get("checkpoint_version")
    if version != VERSION:
        raise ValueError(
            f"{rank.path}: checkpoint_version {version!r}; this import reads {VERSION}. Others "
            "order the rows of linear_qkv in another way: save it again with a newer Megatron-LM"
        )
    args = rank.content["args"]
    for name, found in (
        ("tensor_model_parallel_size", tensor),
        ("pipeline_model_parallel_size", pipeline),
    ):
        if _arg(args, name, rank.path) != found:
            raise ValueError(
                f"{rank.path}: args.{name} is {_arg(args, name, rank.path)}, but there are files "
                f"for {found}; copy the missing mp_rank folders, or remove foreign ones"
            )


def _config(args: Namespace, path: Path, vocab_size: int | None) -> LlamaConfig:
    """The shape, checked to be that of a Llama model."""
    for name, wanted in _FIXED.items():
        found = getattr(args, name, wanted)
        if found != wanted:
            raise ValueError(
                f"{path}: args.{name} is {found!r}; the import knows Llama models with DMC, where "
                f"it is {wanted!r}"
            )
    heads = _arg(args, "num_attention_heads", path)
    grouped = getattr(args, "group_query_attention", False)
    padded = _arg(args, "padded_vocab_size", path)
    if vocab_size is not None and vocab_size > padded:
        raise ValueError(
            f"{path}: args.padded_vocab_size is {padded}, less than the {vocab_size} of the base"
        )
    hidden = _arg(args, "hidden_size", path)
    config = LlamaConfig(
        vocab_size=vocab_size or padded,
        hidden_size=hidden,
        intermediate_size=_arg(args, "ffn_hidden_size", path),
        num_hidden_layers=_arg(args, "num_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_arg(args, "num_query_groups", path) if grouped else heads,
        head_dim=getattr(args, "kv_channels", None) or hidden // heads,
        max_position_embeddings=_arg(args, "max_position_embeddings", path),
        rms_norm_eps=getattr(args, "norm_epsilon", 1e-5),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(getattr(args, "rotary_base", 10000)),
        },
        tie_word_embeddings=not getattr(args, "untie_embeddings_and_output_weights", False),
    )
    known = known_shape(name_of_shape(config) or "")
    if vocab_size is None and known is not None:
        config.vocab_size = min(padded, known.vocab_size)
    return config


def _policy(args: Namespace, path: Path, cr: float | None) -> DMC:
    ratio = cr if cr is not None else getattr(args, "dmc_cr", None)
    if ratio is None:
        raise ValueError(
            f"{path}: args.dmc_cr is missing, so the ratio it was trained for has to be given: "
            "--cr 8, or cr=8 in Python"
        )
    window = getattr(args, "dmc_window_size", WINDOW)
    return DMC(cr=ratio, delay=0, window=window or None, decision="neuron", neuron=-1)


def _arg(args: Namespace, name: str, path: Path) -> Any:
    if not hasattr(args, name):
        raise ValueError(f"{path}: args.{name} is missing; is this a checkpoint of Megatron-LM?")
    return getattr(args, name)
