"""The trainer: a folded student learns from itself with the adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from cachefold.core.accounting import compression_ratio, entries_kept
from cachefold.core.decisions import Decisions
from cachefold.core.schedule import compression_loss
from cachefold.models.fold import FoldRun
from cachefold.models.hub import load_trainable_state, trainable_state
from cachefold.retrofit.checkpoint import RECIPE, WEIGHTS, WRITING, publish
from cachefold.retrofit.config import RetrofitConfig
from cachefold.retrofit.losses import distillation_loss
from cachefold.retrofit.reporting import Meter, Report
from cachefold.retrofit.schedules import Plan


class RetrofitDivergedError(RuntimeError):
    """The loss is no number any more; checkpoints written before are kept."""


class RetrofitTrainer(Trainer):
    """`transformers.Trainer` with the loss, schedules and checkpoints of a retrofit."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RetrofitConfig,
        train_dataset: Dataset[dict[str, Tensor]],
        *,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """Prepares training.

        Args:
            model: folded, and with LoRA unless `teacher` is given; what is to be trained
                requires a gradient.
            config: the recipe.
            train_dataset: items with `input_ids` (seq_len,), in the order of training.
            teacher: the original model, when all weights are trained; None = the model itself
                without its LoRA.
        """
        adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        if teacher is None and not adapters:
            raise ValueError(
                "without LoRA the model can't be its own teacher; add LoRA (train.lora_rank > 0) "
                "or pass teacher="
            )
        self.recipe, self.teacher, self._adapters = config, teacher, adapters
        self.plan = Plan(config.steps, config.build_policy(), config.train, config.data.seq_len)
        self.meter, self._micro = Meter(), (-1, 0)
        self._writing: Path | None = None
        self.report = Report(Path(config.output_dir), config.tokens_per_step)
        model.config.use_cache = False
        if config.train.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        super().__init__(model, _arguments(config), train_dataset=train_dataset)
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)
        self.add_callback(self.report)
        if teacher is not None:
            nn.Module.to(teacher, self.args.device).train(False).requires_grad_(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Distillation + cross entropy + compression on one batch of `input_ids` (B, T)."""
        ids: Tensor = inputs["input_ids"]
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        decisions: dict[int, Decisions] = {}
        train = self.recipe.train
        run = FoldRun(
            mode="relaxed", temperature=train.temperature, relaxation=train.relaxation,
            zero_out=self.plan.zero_out(step), recorder=decisions,
        )  # fmt: skip
        with torch.no_grad(), self._as_teacher(model) as teacher:
            target = self._hidden(teacher, ids, FoldRun(mode="dense"))
        with self._noise(ids.device, step, self._micro[1]):
            student = self._hidden(model, ids, run)
        quality, kd, ce = self._distil(student, target, ids)
        alpha = torch.stack([d.alpha.mean((1, 2)) for d in decisions.values()]).mean(0)
        squeeze = compression_loss(alpha, self.plan.mean_alpha(step))
        loss = quality + train.compression_weight * squeeze
        if not torch.isfinite(loss):
            raise RetrofitDivergedError(
                f"the loss is {loss.item()} at step {step + 1} (kd {kd.item()}, ce {ce.item()}); "
                "checkpoints so far are kept. Lower train.learning_rate, or set train.dtype: "
                "float32, and start again."
            )
        self._measure(decisions, step, kd=kd, ce=ce, alpha=alpha.mean(), compression=squeeze)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _hidden(self, model: nn.Module, ids: Tensor, run: FoldRun) -> Tensor:
        """Last hidden states after the final norm, (B, T, E) in the training dtype."""
        # No token goes through the output embedding here: the loss does that, in chunks.
        dtype = getattr(torch, self.recipe.train.dtype)
        mixed = dtype != torch.float32
        with torch.autocast(ids.device.type, dtype if mixed else None, enabled=mixed):
            output = model(
                input_ids=ids,
                logits_to_keep=ids.new_empty(0),
                output_hidden_states=True,
                use_cache=False,
                fold_run=run,
            )
        hidden: Tensor = output.hidden_states[-1]
        return hidden.to(dtype)

    def _distil(
        self, student: Tensor, target: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.accelerator.unwrap_model(self.model)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        teacher: Any = self.teacher or model
        return distillation_loss(
            student.flatten(0, 1), target.flatten(0, 1), model.get_output_embeddings().weight,
            labels.flatten(), kd_weight=self.recipe.train.kd_weight,
            ce_weight=self.recipe.train.ce_weight,
            teacher_head=teacher.get_output_embeddings().weight,
            softcap=getattr(model.config, "final_logit_softcapping", None),
        )  # fmt: skip

    @contextmanager
    def _as_teacher(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.teacher is not None:
            yield self.teacher
            return
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield model
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)

    @contextmanager
    def _noise(self, device: torch.device, step: int, micro: int) -> Iterator[None]:
        """Random numbers that depend on seed, step and micro step alone."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            seed = (self.recipe.train.seed * 1_000_003 + step) * 1_009 + micro
            torch.manual_seed(seed + 1_000_000_007 * self.args.process_index)
            yield

    def _measure(self, decisions: dict[int, Decisions], step: int, **values: Tensor) -> None:
        kept, seen = 0, 0
        for decision in decisions.values():
            hard = decision.hard().alpha
            hard[..., 0] = 0
            valid = torch.ones_like(hard[:, 0], dtype=torch.bool)
            kept += int(entries_kept(hard, valid, self.plan.policy.delay).sum())
            seen += hard.numel()
        facts = {name: value.item() for name, value in values.items()}
        target = self.plan.trained_cr(step)
        self.meter.add(cr=compression_ratio(seen, kept), target=target, **facts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the loss saw since the last line."""
        if "loss" in logs:
            logs = {**logs, **self.meter.drain()}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW without decay; decision modules have their own learning rate."""
        if self.optimizer is None:
            student: Any = self.model
            named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
            train = self.recipe.train
            rest = [p for n, p in named if ".decision." not in n]
            groups = [
                {"params": rest, "lr": train.learning_rate},
                {"params": [p for n, p in named if ".decision." in n],
                 "lr": train.decision_learning_rate},
            ]  # fmt: skip
            groups = [group for group in groups if group["params"]]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Constant, then a cosine down to a tenth."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.plan.learning_rate)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = self.train_dataset
        return SequentialSampler(dataset)  # the dataset is shuffled already

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing) if self._writing else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside, then renames: a killed run leaves only whole checkpoints."""
        output_dir = Path(self.recipe.output_dir)
        self._writing = output_dir / WRITING
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                publish(self._writing / name, output_dir / name)
                self._writing.rmdir()
                rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        finally:
            self._writing = None

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.recipe.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = trainable_state(self.accelerator.unwrap_model(self.model))
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        student: Any = self.model
        load_trainable_state(student, Path(resume_from_checkpoint) / WEIGHTS)


def _arguments(config: RetrofitConfig) -> TrainingArguments:
    train = config.train
    # The dtype is no business of Trainer: its autocast would turn hidden states into float32.
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=2,
        seed=train.seed,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to=["tensorboard"] if train.tensorboard else [],
    )
