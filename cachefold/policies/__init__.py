"""One compression method, one short file; `base` holds the registry."""

from cachefold.policies.base import get_policy, list_policies
from cachefold.policies.dmc import DMC, DMCC
from cachefold.policies.dms import DMS

__all__ = ["DMC", "DMCC", "DMS", "get_policy", "list_policies"]
