"""The workspace of the retrofit tests, for what scripts train."""

from __future__ import annotations

from tests.retrofit.conftest import workspace

__all__ = ["workspace"]
