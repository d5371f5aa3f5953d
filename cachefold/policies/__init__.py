"""One compression method, one short file; `base` holds the registry."""

from cachefold.policies.base import get_policy, list_policies
from cachefold.policies.dmc import DMC

__all__ = ["DMC", "get_policy", "list_policies"]
