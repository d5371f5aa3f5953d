"""What a retrofit aims for at a given step: stage, target ratio, zero-out, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cachefold.core.dial import nominal_position, ratio_of_step
from cachefold.core.schedule import target_alpha, target_cr, zero_out_factor
from cachefold.retrofit.config import RetrofitConfig, TrainConfig

FINAL_LEARNING_RATE = 0.1
"""Of the full learning rate, reached at the last step."""
LEAST_RATIO = 1.5
"""Least ratio a dial is trained for; below it merging costs next to nothing."""


@dataclass(frozen=True, slots=True)
class RetrofitSchedule:
    """The schedules of one run; all functions of the step alone, so resuming changes nothing.

    A step is the number of optimiser steps done before it: 0 is the first.
    """

    steps: int
    policy: Any
    train: TrainConfig
    seq_len: int

    @classmethod
    def of(cls, config: RetrofitConfig) -> RetrofitSchedule:
        """The schedule of a recipe."""
        return cls(config.steps, config.build_policy(), config.train, config.data.seq_len)

    @property
    def _after_zero_out(self) -> int:
        return self.steps - self.train.zero_out_steps

    @property
    def _solidify_steps(self) -> float:
        return self.train.solidify_fraction * self._after_zero_out

    def stage(self, step: int) -> str:
        """`zero_out`, `retrofit` or `solidify` (the learning rate falls)."""
        if step < self.train.zero_out_steps:
            return "zero_out"
        return "retrofit" if step < self.steps - self._solidify_steps else "solidify"

    def target(self, step: int) -> float:
        """Ratio asked for at a step: the ramp to `policy.cr`, or a ratio of the dial's range.

        The one-sided loss counts per sample, so the mean over samples ends up some 10 % above.
        """
        length = max(round(self.train.ramp_fraction * self._after_zero_out), 1)
        step = max(0, step - self.train.zero_out_steps)
        if self.policy.max_cr is None:
            return target_cr(step, length, self.policy.cr, self.train.ramp_from)
        most = target_cr(step, length, self.policy.max_cr, self.train.ramp_from)
        return ratio_of_step(step, min(LEAST_RATIO, most), most)

    def position(self, step: int) -> float:
        """Position of the dial at a step."""
        return nominal_position(self.target(step))

    def mean_alpha(self, step: int) -> float:
        """Mean merge decision aimed for at a step."""
        return target_alpha(self.target(step), self.seq_len, self.policy.delay)

    def zero_out(self, step: int) -> float:
        """Factor left on the decision neuron at a step; 0 after the stage, and without one."""
        if not self.train.zero_out_steps:
            return 0.0
        return zero_out_factor(step, self.train.zero_out_steps)

    def learning_rate(self, step: int) -> float:
        """Factor on the learning rates: 1, then a cosine down to a tenth."""
        length = self._solidify_steps
        done = step - (self.steps - length)
        if length <= 0 or done <= 0:
            return 1.0
        fall = 0.5 * (1 + math.cos(math.pi * min(done / length, 1.0)))
        return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * fall
