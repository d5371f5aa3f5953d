"""Which caches go with a folded model."""

from __future__ import annotations

from typing import Any

from cachefold.cache import FoldedCache, FoldedLayer
from cachefold.cache.evicting import EvictingLayer
from cachefold.policies.base import LearnedPolicy, Policy
from cachefold.policies.budget import BudgetPolicy

_INSTEAD = (
    "leave past_key_values out, or pass cachefold.models.fold.new_cache(model). Without one, "
    "model(...) and generate() make it, but not model.forward(...) or model.model(...)"
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


def check_goes_on(mode: str, cache: Any) -> None:
    """Refuses to go on with a folded cache in another mode than that of inference.

    Args:
        mode: of a `FoldRun`.
        cache: of any kind, or None.

    Raises:
        ValueError: a FoldedCache, and not mode `hard`.
    """
    if mode != "hard" and isinstance(cache, FoldedCache):
        raise ValueError(
            f"fold_run mode {mode!r} can't go on with a FoldedCache, which carries out hard "
            'decisions; leave past_key_values out, or use FoldRun(mode="hard")'
        )


def layer_of(cache: Any, policy: Policy, index: int) -> Any:
    """The layer of a cache that a folded layer goes on with; None without a cache.

    It checks what a call of the model checks before, as `model.forward` does without.

    Args:
        cache: given to the layer.
        policy: of the layer.
        index: of the layer.

    Raises:
        ValueError: another cache than a folded layer of this policy can fill.
    """
    check_cache(cache)
    if cache is None:
        return None
    layer = cache.layers[index]
    if isinstance(policy, BudgetPolicy):
        fits = isinstance(layer, EvictingLayer) and layer.evictor == policy
    else:
        options = (policy.delay, policy.window)
        fits = isinstance(layer, FoldedLayer) and (layer.delay, layer.window) == options
    if not fits:
        check_fits(cache, policy, sorted({*cache.folded_layers, index}))
    return layer


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
