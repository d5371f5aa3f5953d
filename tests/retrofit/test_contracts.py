"""The private parts of transformers that `retrofit/trainer_hooks.py` and others rely on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.retrofit.trainer_hooks import CheckpointTrainer

HOOKS = {
    "_save_checkpoint": ["self", "model", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_get_output_dir": ["self", "trial"],
    "_get_train_sampler": ["self", "train_dataset"],
}
PUBLIC = {
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "create_optimizer": ["self", "model"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "log": ["self", "logs", "start_time"],
}


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", HOOKS | PUBLIC)
def test_overridden_methods_have_these_signatures(name: str) -> None:
    ours = RetrofitTrainer if name in PUBLIC else CheckpointTrainer
    expected = (HOOKS | PUBLIC)[name]
    assert names(getattr(Trainer, name)) == expected
    assert names(vars(ours)[name]) == expected


def test_hooks_are_all_private_methods_that_are_overridden() -> None:
    ours = {**vars(CheckpointTrainer), **vars(RetrofitTrainer)}
    shared = {n for n, value in ours.items() if inspect.isfunction(value) and hasattr(Trainer, n)}
    assert shared - {"__init__"} == set(HOOKS | PUBLIC)


def test_the_loop_calls_the_hooks() -> None:
    source = inspect.getsource(Trainer)
    for name in HOOKS:
        assert f"self.{name}" in source, name
    assert "self.training_step(" in source
    for name in ("model_accepts_loss_kwargs", "_created_lr_scheduler"):
        assert name in source, name


def test_a_checkpoint_goes_to_the_output_dir_hook() -> None:
    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(" in source and "self.save_model(" in source


def test_last_checkpoint_and_rotation(tmp_path: Path) -> None:
    assert names(get_last_checkpoint) == ["folder"]
    assert names(rotate_checkpoints)[:2] == ["output_dir", "save_total_limit"]
    assert get_last_checkpoint(str(tmp_path)) is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "writing").mkdir()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-15")
    rotate_checkpoints(str(tmp_path), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-15",
        "writing",
    ]


def test_state_and_arguments_have_these_attributes() -> None:
    state = TrainerState()
    assert state.global_step == 0
    assert {"logging_steps", "save_steps", "max_steps"} <= set(vars(state))
    for name in ("world_size", "n_gpu", "process_index"):
        assert isinstance(getattr(TrainingArguments, name), property), name
