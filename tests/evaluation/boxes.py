"""What the tests of the sandbox share: what this machine allows, and programs that must fail."""

from __future__ import annotations

import functools
import sys

import pytest

from cachefold.evaluation.sandbox import Outcome, Protection, Sandbox

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


@functools.cache
def refusal(protection: Protection) -> str | None:
    """Why this machine does not allow it; None where it does."""
    outcome = Sandbox()._run("", protection)
    return outcome if isinstance(outcome, str) else None


def lost(box: Sandbox, source: str) -> Outcome:
    """What a run says of a program that has not passed."""
    outcome = box.run(source)
    assert not outcome.passed and outcome.protection == box.protection
    return outcome
