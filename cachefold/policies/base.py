"""The policy registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from cachefold.core.names import closest

_POLICIES: dict[str, type] = {}
_Policy = TypeVar("_Policy", bound=type)


def register(name: str) -> Callable[[_Policy], _Policy]:
    """Class decorator that makes a frozen dataclass known under `name`."""

    def add(policy: _Policy) -> _Policy:
        assert name not in _POLICIES, f"policy {name!r} registered twice"
        _POLICIES[name] = policy
        return policy

    return add


def list_policies() -> list[str]:
    """Names of all policies, sorted.

    >>> "dmc" in list_policies()
    True
    """
    return sorted(_POLICIES)


def get_policy(name: str, **options: Any) -> Any:
    """Builds a policy from its name and options.

    Raises:
        ValueError: unknown name or option, with the closest match.

    >>> get_policy("dmc", cr=4.0).cr
    4.0
    """
    if name not in _POLICIES:
        allowed = list_policies()
        raise ValueError(
            f"unknown policy {name!r}.{closest(name, allowed)} Available: {', '.join(allowed)}. "
            "See `cachefold ls policies`."
        )
    policy = _POLICIES[name]
    known = [field.name for field in fields(policy)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"policy {name!r} has no option {option!r}.{closest(option, known)} "
                f"Options: {', '.join(known)}."
            )
    return policy(**options)
