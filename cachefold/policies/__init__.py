"""One compression method, one short file; `base` holds the registry."""

from cachefold.policies.base import get_policy, list_policies, policy_class
from cachefold.policies.dmc import DMC, DMCC
from cachefold.policies.dms import DMS
from cachefold.policies.full import Full
from cachefold.policies.gqa import GQA
from cachefold.policies.h2o import H2O
from cachefold.policies.random import Random
from cachefold.policies.streaming import Streaming
from cachefold.policies.tova import TOVA

__all__ = [
    "DMC",
    "DMCC",
    "DMS",
    "GQA",
    "Full",
    "H2O",
    "Random",
    "Streaming",
    "TOVA",
    "get_policy",
    "list_policies",
    "policy_class",
]
