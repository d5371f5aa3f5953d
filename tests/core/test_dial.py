"""Positions, ratios of steps and calibration tables of the dial."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefold.core.dial import NEVER, Dial, nominal_position, ratio_of_step

TABLE = [(1.4, -2.0), (2.0, -0.5), (3.5, 0.5), (7.0, 2.5)]


def test_nominal_position_is_the_logit_of_the_mean_decision() -> None:
    for cr in (1.2, 2.0, 3.7, 8.0):
        assert 1 / (1 + math.exp(-nominal_position(cr))) == pytest.approx(1 - 1 / cr)
    assert nominal_position(1.0) == NEVER


@given(st.integers(0, 10**6), st.floats(1.0, 4.0), st.floats(1.0, 4.0))
def test_ratios_of_steps_stay_in_range(step: int, least: float, factor: float) -> None:
    ratio = ratio_of_step(step, least, least * factor)
    assert least * (1 - 1e-9) <= ratio <= least * factor * (1 + 1e-9)


@pytest.mark.parametrize("start", [0, 117])
def test_ratios_of_any_twenty_steps_are_spread(start: int) -> None:
    logs = sorted(math.log2(ratio_of_step(start + step, 1.0, 8.0)) for step in range(20))
    gaps = [b - a for a, b in zip([0.0, *logs], [*logs, 3.0], strict=True)]
    assert max(gaps) < 3 * 0.13


@given(st.floats(1.01, 12.0), st.floats(1.01, 12.0))
def test_positions_rise_with_the_ratio(one: float, other: float) -> None:
    dial = Dial({"bulk": TABLE})
    low, high = sorted((one, other))
    assert dial.position(low) <= dial.position(high)


def test_positions_meet_the_table_and_go_on_beyond_it() -> None:
    dial = Dial({"bulk": TABLE})
    assert [dial.position(ratio) for ratio, _ in TABLE] == pytest.approx([-2, -0.5, 0.5, 2.5])
    assert dial.position(math.sqrt(3.5 * 7.0)) == pytest.approx(1.5)
    assert dial.position(14.0) == pytest.approx(4.5)
    assert dial.position(1.0) == NEVER


def test_presets() -> None:
    dial = Dial({"bulk": TABLE, "code": [(2.0, 1.0), (4.0, 2.0)]})
    assert dial.position(2.0) == -0.5
    assert dial.position(2.0, "code") == 1.0
    with pytest.raises(ValueError, match=r"unknown preset 'cod'.*'code'.*bulk, code"):
        dial.position(2.0, "cod")
    assert Dial().position(3.0) == nominal_position(3.0)
    with pytest.raises(ValueError, match="none; run `cachefold calibrate`"):
        Dial().position(3.0, "chat")
