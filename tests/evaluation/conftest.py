"""A sandbox under each kind of protection."""

from __future__ import annotations

import pytest

from cachefold.evaluation.sandbox import PROTECTIONS, Sandbox
from tests.evaluation.boxes import refusal


@pytest.fixture(params=PROTECTIONS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    if (reason := refusal(request.param)) is not None:
        pytest.skip(reason[:200])
    return Sandbox(timeout=20.0, protection=request.param)
