"""A retrofit from its recipe to a saved artefact."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachefold.core.accounting import compression_ratio, count_entries, entries_kept
from cachefold.core.decisions import Decisions
from cachefold.models.calibration import calibrate
from cachefold.models.dial import has_dial, turn_dial
from cachefold.models.fold import FoldRun
from cachefold.models.hub import CONFIG, read_config, save_folded
from cachefold.models.weights import load_trainable_state, trainable_state
from cachefold.retrofit.checkpoint import RECIPE, WEIGHTS, check_finite, check_output, claim_output
from cachefold.retrofit.config import RetrofitConfig
from cachefold.retrofit.data import (
    PackedDataset,
    check_text,
    load_blocks,
    preset_texts,
    split_held_out,
)
from cachefold.retrofit.plan import plan_retrofit
from cachefold.retrofit.prepare import check_init, load_model, prepare
from cachefold.retrofit.reporting import LOG
from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.viz import MAP
from cachefold.zoo import base_revision, is_shape_only

FINAL = "final"


def run_retrofit(
    config: RetrofitConfig, *, resume: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Does a whole retrofit.

    Args:
        config: the recipe.
        resume: continue the run in `output_dir` from its last checkpoint.
        dry_run: print the plan, then load, fold, read the data, do one forward and backward pass
            and write and read back a checkpoint in a temporary folder; nothing stays. Of a model
            of `models.shapes` that was never downloaded there is only the plan.

    Returns:
        Facts: `steps`, `tokens`, `sequences`, `trainable` (parameters); after a dry run `loss`
        and `seconds` of the pass; after training `cr` (held-out) and `folder` of the artefact.
        Nothing where there is only the plan.

    Raises:
        ValueError: anything wrong with recipe, model, data or output folder; the folder is left
            as it was.
        RetrofitDivergedError: loss, gradient or weights are not finite any more.
    """
    plan_alone = dry_run and is_shape_only(config.model)
    _check(config, resume, reads_text=not plan_alone)
    if dry_run:
        print(plan_retrofit(config).describe(), flush=True)
    if plan_alone:
        return {}
    model, tokenizer = load_model(config)
    blocks, held_out = split_held_out(load_blocks(config.data, tokenizer), config.data.held_out)
    # Now and not after hours of training: text may be missing.
    texts = preset_texts(config.data, tokenizer) if has_dial(config.build_policy()) else {}
    teacher = prepare(model, config)
    facts = _facts(config, model, len(blocks))
    length = config.steps * config.train.batch_size * config.train.accumulation
    dataset = PackedDataset(blocks, seed=config.train.seed, length=length)
    if dry_run:
        return {**facts, **rehearse(model, config, dataset, teacher)}
    trainer = RetrofitTrainer(model, args=config, train_dataset=dataset, teacher=teacher)
    checkpoint = claim_output(config)
    if resume and checkpoint is None:
        print("no checkpoint yet, starting at step 1", flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.report.close()
    return {**facts, **finish(model, config, held_out, texts, facts["tokens"])}


def _facts(config: RetrofitConfig, model: PreTrainedModel, sequences: int) -> dict[str, Any]:
    return {
        "steps": config.steps,
        "tokens": config.steps * config.tokens_per_step,
        "sequences": sequences,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _check(config: RetrofitConfig, resume: bool, reads_text: bool) -> None:
    """Refuses what can be known to fail before a model is loaded and text is tokenised."""
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard needs tensorboard: pip install tensorboard")
    check_output(config, resume)
    if config.init is not None:
        check_init(config)
    if reads_text:
        check_text(config.data)


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
        RetrofitDivergedError: loss or gradient is not finite.
        ValueError: the checkpoint can't be read back.
    """
    items = [dataset[i]["input_ids"] for i in range(config.train.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RetrofitTrainer(
            model,
            args=replace(config, output_dir=folder),
            train_dataset=dataset,
            teacher=teacher,
        )
        batch = {"input_ids": torch.stack(items).to(trainer.args.device)}
        start = time.perf_counter()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        trainer.check_gradients()
        seconds = time.perf_counter() - start
        trainer.save_model(folder)
        load_trainable_state(model, Path(folder) / WEIGHTS)
        trainer.report.close()
    return {"loss": loss.item(), "seconds": seconds}


def finish(
    model: PreTrainedModel, config: RetrofitConfig, held_out: Tensor, texts: dict[str, Tensor],
    tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Calibrates a dial, measures on held-out text, writes artefact, map, recipe and log.

    Raises:
        RetrofitDivergedError: a weight is not finite; nothing is written.
    """
    check_finite(trainable_state(model), config.steps)
    output = Path(config.output_dir)
    folder = output / FINAL
    if texts:
        # A finished run that is resumed ends with the same weights, so other presets still fit.
        known = read_config(folder).get("dial", {}) if (folder / CONFIG).is_file() else {}
        _calibrate(model.train(False), texts, known)
    result = measure(model, held_out, config)
    save_folded(
        model, folder, base={"id": config.model, "revision": base_revision(config.model, model)},
        extra={"tokens": tokens, "seq_len": config.data.seq_len, "cr": result["cr"]},
    )  # fmt: skip
    (folder / MAP).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(config.to_yaml(), encoding="utf-8")
    if (output / LOG).is_file():
        shutil.copyfile(output / LOG, folder / LOG)
    least = result["least_cr"]
    print(f"held-out cr {result['cr']:.3f} (least {least:.3f}), saved to {folder}", flush=True)
    return {"cr": result["cr"], "least_cr": least, "folder": str(folder)}


def _calibrate(model: PreTrainedModel, texts: dict[str, Tensor], known: dict[str, Any]) -> None:
    """Calibrates a dial; one that can't be is saved all the same, with nominal positions.

    Presets that are known and not among the texts are kept.
    """
    print("calibrating the dial", flush=True)
    try:
        turn_dial(model, known | calibrate(model, texts))
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"warning: not calibrated: {error}. See `cachefold calibrate`", flush=True)


@torch.no_grad()
def measure(model: PreTrainedModel, held_out: Tensor, config: RetrofitConfig) -> dict[str, Any]:
    """Ratios on held-out sequences with the hard decisions of inference.

    Args:
        model: folded; left in eval mode.
        held_out: (M, T) token ids.
        config: the recipe.

    Returns:
        `cr` over everything, `least_cr` of one sequence, `tokens` of a sequence, and `map`:
        for each folded layer its index `layer` and the `cr` of every head.
    """
    policy, (sequences, tokens) = config.build_policy(), held_out.shape
    # An entry of pooled heads stands for one of each head that the model had.
    pooled = model.config.num_key_value_heads / policy.kv_heads if policy.kv_heads else 1
    valid = torch.ones(1, tokens, dtype=torch.bool, device=model.device)
    model.train(False)
    counts: list[tuple[int, int]] = []
    entries: dict[int, Tensor] = {}  # (K,) per layer, summed over sequences
    for block in held_out:
        decisions = _decide(model, block[None].to(model.device), config.train.dtype)
        counts.append(count_entries((d.alpha for d in decisions.values()), valid, policy.delay))
        for layer, decision in decisions.items():
            kept = entries_kept(decision.alpha, valid, policy.delay)[0].cpu()
            entries[layer] = entries.get(layer, 0) + kept
    rows = [
        {"layer": layer, "cr": (pooled * tokens * sequences / entries[layer]).tolist()}
        for layer in sorted(entries)
    ]
    seen, kept_in_all = (sum(column) for column in zip(*counts, strict=True))
    least = min(compression_ratio(seen * pooled, kept) for seen, kept in counts)
    total = compression_ratio(seen * pooled, kept_in_all)
    return {"cr": total, "least_cr": least, "tokens": tokens, "map": rows}


def _decide(model: PreTrainedModel, ids: Tensor, dtype: str) -> dict[int, Decisions]:
    """Hard decisions on (1, T) ids, by layer."""
    decisions: dict[int, Decisions] = {}
    mixed = dtype != "float32"
    with torch.autocast(ids.device.type, getattr(torch, dtype) if mixed else None, enabled=mixed):
        model(
            input_ids=ids, logits_to_keep=1, use_cache=False,
            fold_run=FoldRun(mode="hard", recorder=decisions),
        )  # fmt: skip
    return decisions
