"""What `transformers.Trainer` and the model have to be told about a recipe."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from cachefold.retrofit.config import RetrofitConfig, TrainConfig


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """What is trained, for an optimiser; decision modules have their own learning rate.

    `train.weight_decay` is for matrices alone, as usual: norms, biases and decisions have none.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decisions = [p for name, p in named if ".decision." in name]
    others = [p for name, p in named if ".decision." not in name]
    lr, decision_lr = train.learning_rate, train.decision_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "lr": lr, "weight_decay": train.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": decisions, "lr": decision_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Trades compute for memory in the backward pass."""
    # transformers renamed it after 5.17, and warns about the old name.
    new: Any = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def training_arguments(config: RetrofitConfig) -> TrainingArguments:
    """The recipe in the words of `transformers.Trainer`.

    Raises:
        ValueError: more than one process or GPU.
    """
    arguments = _plain_arguments(config)
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise ValueError(
            f"a retrofit runs in one process on one device for now; there are "
            f"{arguments.world_size} processes with {arguments.n_gpu} GPUs each. Start it without "
            "torchrun or accelerate launch, with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def _plain_arguments(config: RetrofitConfig) -> TrainingArguments:
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
