"""The trainer: a folded student learns from itself with the adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback

from cachefold.core.accounting import compression_ratio, count_entries
from cachefold.core.decisions import Decisions, constrain
from cachefold.core.schedule import compression_loss
from cachefold.models.dial import has_dial
from cachefold.models.fold import FoldRun, zero_decision_neurons
from cachefold.models.lora import adapters_disabled, lora_rank
from cachefold.retrofit.arguments import (
    checkpoint_activations,
    parameter_groups,
    training_arguments,
)
from cachefold.retrofit.checkpoint import RetrofitDivergedError
from cachefold.retrofit.config import RetrofitConfig
from cachefold.retrofit.losses import distillation_loss, hidden_loss
from cachefold.retrofit.reporting import Meter, Report
from cachefold.retrofit.schedule import RetrofitSchedule
from cachefold.retrofit.trainer_hooks import CheckpointTrainer


class RetrofitTrainer(CheckpointTrainer):
    """`transformers.Trainer` with the loss, schedules and checkpoints of a retrofit.

    >>> import tempfile
    >>> import torch
    >>> import cachefold
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cachefold.models.lora import add_lora
    >>> from cachefold.retrofit.config import DataConfig, TrainConfig
    >>> from cachefold.retrofit.data import PackedDataset
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=32)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1))
    >>> model = add_lora(cachefold.fold(model, cachefold.DMC(cr=2, delay=4)), rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = RetrofitConfig(
    ...         model="tiny",
    ...         output_dir=folder,
    ...         policy={"name": "dmc", "cr": 2, "delay": 4},
    ...         data=DataConfig(seq_len=16),
    ...         train=TrainConfig(tokens=32, dtype="float32"),
    ...     )
    ...     text = PackedDataset(torch.randint(0, 32, (2, 16)))
    ...     RetrofitTrainer(model, args=config, train_dataset=text).train().global_step
    step 1/2 retrofit loss 0.0000 kd 0.0000 cr 1.00/1.00 alpha ...
    step 2/2 retrofit loss ... cr 1.00/2.00 alpha ...
    2
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: RetrofitConfig,
        train_dataset: Dataset[dict[str, Tensor]],
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """Prepares training.

        Args:
            model: folded, and with LoRA unless `teacher` is given; what is to be trained
                requires a gradient.
            args: the recipe.
            train_dataset: items with `input_ids` (seq_len,), in the order of training.
            teacher: the original model, when all weights are trained; None = the model itself
                without its LoRA, or no teacher with `train.kd_weight` 0.

        Raises:
            ValueError: no teacher and no LoRA, or more than one process or GPU.
        """
        if args.train.kd_weight and teacher is None and not lora_rank(model):
            raise ValueError(
                "without LoRA the model can't be its own teacher; add LoRA (train.lora_rank > 0) "
                "or pass teacher="
            )
        self.recipe, self.teacher = args, teacher
        self._writing = None
        self.schedule = RetrofitSchedule.of(args)
        self.meter, self._micro = Meter(), (-1, 0)
        self.report = Report(Path(args.output_dir), args.tokens_per_step, self.schedule)
        model.config.use_cache = False
        if args.train.gradient_checkpointing:
            checkpoint_activations(model)
        super().__init__(model, training_arguments(args), train_dataset=train_dataset)
        self.model_accepts_loss_kwargs = False  # so the loss is divided by train.accumulation
        self.remove_callback(PrinterCallback)
        self.add_callback(self.report)
        if teacher is not None:
            nn.Module.to(teacher, self.args.device).train(False).requires_grad_(False)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One forward and backward pass.

        Raises:
            RetrofitDivergedError: loss or gradient is not finite; no weight was changed by it.
        """
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        # Before the first step without zero-out, by the step alone: a resumed run does it too.
        if 0 < self.recipe.train.zero_out_steps == step and self._micro[1] == 0:
            zero_decision_neurons(self.accelerator.unwrap_model(self.model))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.check_gradients()
        return loss

    def check_gradients(self) -> None:
        """Looks at the gradients before anything is done with them.

        Raises:
            RetrofitDivergedError: their norm is not finite.
        """
        model: Any = self.model
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            step = self.state.global_step + 1
            raise RetrofitDivergedError(f"the gradient norm is {norm.item()} at step {step}")

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
        decisions: dict[int, Decisions] = {}
        target = self._target(model, ids)
        with self._noise(ids.device, step, self._micro[1]):
            student = self._hidden(model, ids, self._student_run(step, decisions))
        distillation, kd, ce = self._distil(student, target, ids)
        alpha = torch.stack([d.alpha.mean((1, 2)) for d in decisions.values()]).mean(0)
        dial = has_dial(self.schedule.policy)
        compression = compression_loss(alpha, self.schedule.mean_alpha(step), exact=dial)
        loss = distillation + self.recipe.train.compression_weight * compression
        facts = {"kd": kd, "ce": ce, "alpha": alpha.mean(), "compression": compression}
        if self.recipe.train.hidden_weight:
            assert target is not None, "checked with the recipe"
            facts["hidden"] = hidden_loss(student, target)
            loss = loss + self.recipe.train.hidden_weight * facts["hidden"]
        if not torch.isfinite(loss):
            raise RetrofitDivergedError(
                f"the loss is {loss.item()} at step {step + 1} (kd {kd.item()}, ce {ce.item()})"
            )
        self._measure(decisions, step, facts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _student_run(self, step: int, decisions: dict[int, Decisions]) -> FoldRun:
        train = self.recipe.train
        if self.schedule.stage(step) == "zero_out":
            factor = self.schedule.zero_out(step)
            return FoldRun(mode="append", zero_out=factor, recorder=decisions)
        return FoldRun(
            mode="relaxed", temperature=train.temperature, relaxation=train.relaxation,
            position=self.schedule.position(step), recorder=decisions,
        )  # fmt: skip

    def _target(self, model: nn.Module, ids: Tensor) -> Tensor | None:
        """Hidden states (B, T, E) of the original model; None where nothing is distilled."""
        if not self.recipe.train.kd_weight:
            return None
        with torch.no_grad(), self._as_teacher(model) as teacher:
            return self._hidden(teacher, ids, FoldRun(mode="dense"))

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
        self, student: Tensor, target: Tensor | None, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.accelerator.unwrap_model(self.model)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        teacher: Any = self.teacher or model
        return distillation_loss(
            student.flatten(0, 1), None if target is None else target.flatten(0, 1),
            model.get_output_embeddings().weight, labels.flatten(),
            kd_weight=self.recipe.train.kd_weight, ce_weight=self.recipe.train.ce_weight,
            teacher_head=teacher.get_output_embeddings().weight,
            softcap=getattr(model.config, "final_logit_softcapping", None),
        )  # fmt: skip

    @contextmanager
    def _as_teacher(self, model: nn.Module) -> Iterator[nn.Module]:
        """The original model, without dropout; the modules of `model` come back as they were."""
        if self.teacher is not None:
            yield self.teacher
            return
        student: Any = self.accelerator.unwrap_model(model)
        with adapters_disabled(student), _evaluating(student):
            yield model

    @contextmanager
    def _noise(self, device: torch.device, step: int, micro: int) -> Iterator[None]:
        """Random numbers that depend on seed, step and micro step alone."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            seed = (self.recipe.train.seed * 1_000_003 + step) * 1_009 + micro
            torch.manual_seed(seed + 1_000_000_007 * self.args.process_index)
            yield

    def _measure(
        self, decisions: dict[int, Decisions], step: int, facts: dict[str, Tensor]
    ) -> None:
        """Keeps for the log: facts, ratio with hard decisions, and target."""
        merges = self.schedule.stage(step) != "zero_out"
        alphas = [(d.hard() if merges else d).alpha.detach() for d in decisions.values()]
        valid = torch.ones_like(alphas[0][:, 0], dtype=torch.bool)  # packed: no padding
        alphas = [constrain(alpha, valid) for alpha in alphas]
        seen, kept = count_entries(alphas, valid, self.schedule.policy.delay)
        self.meter.add(
            cr=compression_ratio(seen, kept),
            target=self.schedule.target(step),
            **{name: value.item() for name, value in facts.items()},
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the loss saw since the last line, and the speed, for every logger."""
        if "loss" in logs:
            logs = {**logs, **self.meter.drain(), **self.report.speed(self.state)}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; decision modules have their own learning rate and no decay."""
        if self.optimizer is None:
            student: Any = self.model
            groups = parameter_groups(student, self.recipe.train)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Constant, then a cosine down to a tenth."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.learning_rate)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        return self.lr_scheduler


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the length of a `with` block."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
