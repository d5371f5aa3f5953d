"""What a retrofit aims for at a given step: learning rate, target ratio, zero-out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cachefold.core.schedule import target_alpha, target_cr, zero_out_factor
from cachefold.retrofit.config import TrainConfig

FINAL_LEARNING_RATE = 0.1
"""Of the full learning rate, reached at the last step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The schedules of one run; all functions of the step alone, so resuming changes nothing."""

    steps: int
    policy: Any
    train: TrainConfig
    seq_len: int

    def trained_cr(self, step: int) -> float:
        """Ratio aimed for at a step, head-room included."""
        ramp = round(self.train.ramp_fraction * (self.steps - self.train.zero_out_steps))
        full = self.policy.cr * (1 + self.train.cr_margin) if self.policy.cr > 1 else 1.0
        return target_cr(max(0, step - self.train.zero_out_steps), max(ramp, 1), full)

    def mean_alpha(self, step: int) -> float:
        """Mean merge decision aimed for at a step."""
        return target_alpha(self.trained_cr(step), self.seq_len, self.policy.delay)

    def zero_out(self, step: int) -> float:
        """Factor left on the decision neuron at a step."""
        if not self.train.zero_out_steps:
            return 0.0
        return zero_out_factor(step, self.train.zero_out_steps)

    def learning_rate(self, step: int) -> float:
        """Factor on the learning rates: 1, then a cosine down to a tenth."""
        length = self.train.solidify_fraction * self.steps
        done = step - (self.steps - length)
        if length <= 0 or done <= 0:
            return 1.0
        fall = 0.5 * (1 + math.cos(math.pi * min(done / length, 1.0)))
        return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * fall
