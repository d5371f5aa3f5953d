"""A retrofit from its recipe to a saved artefact."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cachefold.core.accounting import compression_ratio, entries_kept
from cachefold.core.decisions import Decisions
from cachefold.models.fold import FoldRun, fold
from cachefold.models.hub import add_lora, load_trainable_state, save_folded
from cachefold.retrofit.checkpoint import WEIGHTS, prepare_output
from cachefold.retrofit.config import RetrofitConfig
from cachefold.retrofit.data import PackedDataset, load_blocks, split_held_out
from cachefold.retrofit.trainer import RetrofitTrainer

FINAL = "final"
MAP = "map.json"


def run_retrofit(
    config: RetrofitConfig, *, resume: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Does a whole retrofit.

    Args:
        config: the recipe.
        resume: continue the run in `output_dir` from its last checkpoint.
        dry_run: load, fold, read the data, do one forward and backward pass and write and
            read back a checkpoint in a temporary folder; nothing stays.

    Returns:
        Facts: `steps`, `tokens`, `sequences`, `trainable` (parameters); after a dry run `loss`
        and `seconds` of the pass; after training `cr` (held-out) and `folder` of the artefact.

    Raises:
        ValueError: anything wrong with recipe, data or output folder.
        RetrofitDivergedError: the loss is no number any more.
    """
    _check_tensorboard(config)
    checkpoint = None
    if not dry_run:
        checkpoint = prepare_output(Path(config.output_dir), config.to_yaml(), resume)
    model, tokenizer = load_model(config)
    blocks, held_out = split_held_out(load_blocks(config.data, tokenizer), config.data.held_out)
    teacher = prepare(model, config)
    facts: dict[str, Any] = {
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "sequences": len(blocks),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    length = config.steps * config.train.batch_size * config.train.accumulation
    dataset = PackedDataset(blocks, seed=config.train.seed, length=length)
    if dry_run:
        return {**facts, **rehearse(model, config, dataset, teacher)}
    trainer = RetrofitTrainer(model, config, dataset, teacher=teacher)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.report.close()
    return {**facts, **finish(model, config, held_out, facts["tokens"])}


def _check_tensorboard(config: RetrofitConfig) -> None:
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard needs tensorboard: pip install tensorboard")


def rehearse(
    model: PreTrainedModel,
    config: RetrofitConfig,
    dataset: PackedDataset,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """One forward and backward pass on the first batch, and a checkpoint written and read back.

    Returns:
        `loss`, and `seconds` the pass took.

    Raises:
        RetrofitDivergedError: the loss is no number.
        ValueError: the checkpoint can't be read back.
    """
    items = [dataset[i]["input_ids"] for i in range(config.train.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RetrofitTrainer(
            model, replace(config, output_dir=folder), dataset, teacher=teacher
        )
        batch = {"input_ids": torch.stack(items).to(trainer.args.device)}
        start = time.perf_counter()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        seconds = time.perf_counter() - start
        trainer.save_model(folder)
        load_trainable_state(model, Path(folder) / WEIGHTS)
        trainer.report.close()
    return {"loss": loss.item(), "seconds": seconds}


def load_model(config: RetrofitConfig) -> tuple[PreTrainedModel, Any]:
    """Loads the base model and its tokenizer: a folder or hub id, else a zoo name."""
    dtype = getattr(torch, config.train.dtype)
    if config.train.lora_rank == 0:
        dtype = torch.float32  # trained weights; the products are in train.dtype all the same
    if "/" in config.model or Path(config.model).is_dir():
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(config.model)
    from cachefold.zoo import load_base

    base: tuple[PreTrainedModel, Any] = load_base(config.model, dtype=dtype)
    return base


def prepare(model: PreTrainedModel, config: RetrofitConfig) -> PreTrainedModel | None:
    """Folds a model in place and decides what is trained.

    Returns:
        The teacher, when the model can't be its own because all weights are trained.
    """
    teacher = None
    if config.train.lora_rank == 0:
        teacher, _ = load_model(config)
        fold(teacher, config.build_policy())  # to know `fold_run`; runs dense
    fold(model, config.build_policy())
    if config.train.lora_rank:
        with torch.random.fork_rng():
            torch.manual_seed(config.train.seed)
            add_lora(model, config.train.lora_rank)
    return teacher


def finish(
    model: PreTrainedModel, config: RetrofitConfig, held_out: Tensor, tokens: int
) -> dict[str, Any]:
    """Measures on held-out text and writes the artefact and its map."""
    result = measure(model, held_out, config)
    folder = Path(config.output_dir) / FINAL
    save_folded(
        model, folder, base={"id": config.model, "revision": "main"},
        extra={"tokens": tokens, "seq_len": config.data.seq_len, "cr": result["cr"]},
    )  # fmt: skip
    (folder / MAP).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(config.to_yaml(), encoding="utf-8")
    least = result["least_cr"]
    print(f"held-out cr {result['cr']:.3f} (least {least:.3f}), saved to {folder}", flush=True)
    return {"cr": result["cr"], "least_cr": least, "folder": str(folder)}


@torch.no_grad()
def measure(model: PreTrainedModel, held_out: Tensor, config: RetrofitConfig) -> dict[str, Any]:
    """Ratios on held-out sequences with the hard decisions of inference.

    Returns:
        `cr` over everything, `least_cr` of one sequence, `tokens` of a sequence, and `map`:
        for each folded layer its index `layer` and the `cr` of every head.
    """
    policy, device = config.build_policy(), next(model.parameters()).device
    dtype = getattr(torch, config.train.dtype)
    mixed = dtype != torch.float32
    model.train(False)
    kept: dict[int, list[Tensor]] = {}
    for block in held_out:
        decisions: dict[int, Decisions] = {}
        with torch.autocast(device.type, dtype if mixed else None, enabled=mixed):
            model(
                input_ids=block[None].to(device), logits_to_keep=1, use_cache=False,
                fold_run=FoldRun(mode="hard", recorder=decisions),
            )  # fmt: skip
        valid = torch.ones(1, len(block), dtype=torch.bool, device=device)
        for layer, decision in decisions.items():
            entries = entries_kept(decision.alpha, valid, policy.delay)[0].cpu()
            kept.setdefault(layer, []).append(entries)
    entries = torch.stack([torch.stack(kept[layer]) for layer in sorted(kept)])  # (L, M, K)
    num_layers, num_blocks, heads = entries.shape
    tokens = held_out.shape[1]
    each = [
        compression_ratio(tokens * num_layers * heads, int(entries[:, i].sum()))
        for i in range(num_blocks)
    ]
    per_head = (tokens * num_blocks / entries.sum(1)).tolist()
    rows = [{"layer": layer, "cr": row} for layer, row in zip(sorted(kept), per_head, strict=True)]
    total = compression_ratio(tokens * entries[..., 0].numel() * heads, int(entries.sum()))
    return {"cr": total, "least_cr": min(each), "tokens": tokens, "map": rows}
