"""Which caches go with a folded model."""

from __future__ import annotations

from typing import Any

from cachefold.cache import FoldedCache
from cachefold.policies.base import LearnedPolicy, Policy
from cachefold.policies.budget import BudgetPolicy

_INSTEAD = (
    "leave past_key_values out, and a call of the model and generate() make one, or pass "
    "cachefold.models.fold.new_cache(model)"
)


def fold_options(policy: LearnedPolicy) -> dict[str, Any]:
    """The options of a FoldedCache that follow from the policy of the model.

    >>> from cachefold import DMC
    >>> fold_options(DMC(delay=4))
    {'delay': 4, 'window': None, 'kv_heads': None, 'proportional': False}
    """
    return {
        "delay": policy.delay,
        "window": policy.window,
        "kv_heads": policy.kv_heads,
        "proportional": getattr(policy, "proportional", False),
    }


def check_cache(cache: Any) -> None:
    """Refuses a cache that a folded layer can't fill.

    Raises:
        ValueError: anything but None or a FoldedCache.
    """
    if cache is not None and not isinstance(cache, FoldedCache):
        raise ValueError(
            f"a folded model needs a FoldedCache, got {type(cache).__name__}; {_INSTEAD}"
        )


def check_fits(cache: FoldedCache, policy: Policy, layers: list[int]) -> None:
    """Refuses a cache that was made for another policy or other layers.

    Args:
        cache: given to the model.
        policy: of the model.
        layers: indices of its folded layers.

    Raises:
        ValueError: they don't go together; names what differs.
    """
    evictor = policy if isinstance(policy, BudgetPolicy) else None
    if cache.evictor != evictor:
        raise ValueError(
            f"this cache was made for {cache.evictor or 'a policy that folds'}, but the model is "
            f"folded with {policy}; {_INSTEAD}"
        )
    wanted: dict[str, Any] = {"folded_layers": layers}
    if not isinstance(policy, BudgetPolicy):
        wanted |= fold_options(policy)
    for name, value in wanted.items():
        if getattr(cache, name) != value:
            raise ValueError(
                f"this cache was made with {name}={getattr(cache, name)!r}, but the model is "
                f"folded with {name}={value!r}; {_INSTEAD}"
            )
