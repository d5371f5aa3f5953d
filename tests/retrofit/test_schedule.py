"""Stages, target, learning rate."""

from __future__ import annotations

import pytest

from cachefold.retrofit.config import from_dict
from cachefold.retrofit.schedule import RetrofitSchedule


def schedule(steps: int = 100, decision: str = "linear", **train: object) -> RetrofitSchedule:
    return RetrofitSchedule.of(
        from_dict({
            "model": "m", "output_dir": "o",
            "policy": {"name": "dmc", "cr": 4, "delay": 4, "decision": decision},
            "data": {"seq_len": 64},
            "train": {"tokens": steps * 64, "ramp_fraction": 0.5, **train},
        })
    )  # fmt: skip


def test_the_target_ramps_to_the_ratio_asked() -> None:
    plan = schedule()
    assert [plan.target(step) for step in (0, 25, 50, 99)] == [1.0, 2.5, 4.0, 4.0]


def test_stages_follow_one_another() -> None:
    plan = schedule(decision="neuron", lora_rank=0, zero_out_steps=20, solidify_fraction=0.25)
    stages = [plan.stage(step) for step in range(100)]
    assert stages == ["zero_out"] * 20 + ["retrofit"] * 60 + ["solidify"] * 20
    assert [plan.target(step) for step in (0, 19, 20, 40, 60)] == [1.0, 1.0, 1.0, 2.5, 4.0]
    assert [plan.zero_out(step) for step in (0, 8, 16, 20, 99)] == [1.0, 0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("zero_out_steps", [0, 60])
def test_the_target_is_reached_before_the_learning_rate_falls(zero_out_steps: int) -> None:
    neuron = {"decision": "neuron", "lora_rank": 0} if zero_out_steps else {}
    plan = schedule(
        zero_out_steps=zero_out_steps, ramp_fraction=0.7, solidify_fraction=0.3, **neuron
    )
    falling = next(step for step in range(100) if plan.learning_rate(step) < 1)
    assert plan.target(falling) == 4.0
    assert plan.learning_rate(100) == pytest.approx(0.1)
