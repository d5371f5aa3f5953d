"""cachefold: a KV cache that folds itself (Dynamic Memory Compression for Hugging Face models).

Names are imported on first use, so that `cachefold --help` need not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefold.cache.folded import FoldedCache
    from cachefold.core.decisions import Decisions
    from cachefold.models.fold import FoldRun, fold, folded, is_folded, unfold
    from cachefold.models.hub import load_folded, save_folded
    from cachefold.policies import (
        DMC,
        DMCC,
        DMS,
        GQA,
        H2O,
        TOVA,
        Full,
        Random,
        Streaming,
        get_policy,
        list_policies,
    )
    from cachefold.retrofit.config import RetrofitConfig
    from cachefold.retrofit.trainer import RetrofitTrainer

__version__ = "0.1.0"

_HOMES = {
    "DMC": "cachefold.policies",
    "DMCC": "cachefold.policies",
    "DMS": "cachefold.policies",
    "GQA": "cachefold.policies",
    "Decisions": "cachefold.core.decisions",
    "FoldRun": "cachefold.models.fold",
    "FoldedCache": "cachefold.cache.folded",
    "Full": "cachefold.policies",
    "H2O": "cachefold.policies",
    "Random": "cachefold.policies",
    "RetrofitConfig": "cachefold.retrofit.config",
    "RetrofitTrainer": "cachefold.retrofit.trainer",
    "Streaming": "cachefold.policies",
    "TOVA": "cachefold.policies",
    "fold": "cachefold.models.fold",
    "folded": "cachefold.models.fold",
    "get_policy": "cachefold.policies",
    "is_folded": "cachefold.models.fold",
    "list_policies": "cachefold.policies",
    "load_folded": "cachefold.models.hub",
    "save_folded": "cachefold.models.hub",
    "unfold": "cachefold.models.fold",
}

__all__ = [
    "DMC",
    "DMCC",
    "DMS",
    "Decisions",
    "FoldRun",
    "FoldedCache",
    "Full",
    "GQA",
    "H2O",
    "Random",
    "RetrofitConfig",
    "RetrofitTrainer",
    "Streaming",
    "TOVA",
    "fold",
    "folded",
    "get_policy",
    "is_folded",
    "list_policies",
    "load_folded",
    "save_folded",
    "unfold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cachefold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
