"""The private methods of `transformers.Trainer` that a retrofit replaces, all of them.

`tests/retrofit/test_contracts.py` checks that they are still there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from cachefold.models.weights import load_trainable_state, trainable_state
from cachefold.retrofit.checkpoint import RECIPE, WEIGHTS, WRITING, check_finite, publish
from cachefold.retrofit.config import RetrofitConfig


class CheckpointTrainer(Trainer):
    """A trainer whose checkpoints hold what is trained, and are whole and finite, or absent."""

    recipe: RetrofitConfig
    _writing: Path | None
    """Folder the checkpoint is written in at the moment."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = self.train_dataset
        return SequentialSampler(dataset)  # the dataset is shuffled already

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing) if self._writing else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside, then renames: a killed run leaves only whole checkpoints."""
        output_dir = Path(self.recipe.output_dir)
        check_finite(self._moments(), self.state.global_step)
        self._writing = output_dir / WRITING
        try:
            super()._save_checkpoint(model, trial)
            name = f"checkpoint-{self.state.global_step}"
            publish(self._writing / name, output_dir / name)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        finally:
            shutil.rmtree(self._writing, ignore_errors=True)
            self._writing = None

    def _moments(self) -> dict[str, Tensor]:
        optimizer: Any = self.optimizer
        states = enumerate(optimizer.state.values())
        return {f"{name} of parameter {i}": t for i, state in states for name, t in state.items()}

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.recipe.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = trainable_state(self.accelerator.unwrap_model(self.model))
        check_finite(state, self.state.global_step)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        student: Any = self.model
        load_trainable_state(student, Path(resume_from_checkpoint) / WEIGHTS)
