"""What the audit hook stands for where no namespaces do: it is not to be had round plainly."""

from __future__ import annotations

import pytest

from cachefold.evaluation.sandbox import Sandbox
from tests.evaluation.boxes import ON_LINUX, lost, refusal

pytestmark = ON_LINUX


@pytest.fixture(params=["seccomp", "audit"])
def hooked(request: pytest.FixtureRequest) -> Sandbox:
    if (reason := refusal(request.param)) is not None:
        pytest.skip(reason[:200])
    return Sandbox(timeout=20.0, protection=request.param)


def test_no_lease_keeps_others_waiting(hooked):
    lost(hooked, f"import fcntl; fcntl.fcntl(open({__file__!r}), fcntl.F_SETLEASE, fcntl.F_RDLCK)")
