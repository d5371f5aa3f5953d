"""What a policy is, and the registry of policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from cachefold.core.names import closest
from cachefold.policies.budget import BudgetPolicy


class Decision(Protocol):
    """The module that decides in one attention layer."""

    neuron: int | None
    """Channel of queries and keys that decides and must leave attention; None = none."""

    @property
    def size_weight(self) -> Tensor | None:
        """(K,) float32, weight of log(tokens merged) in the score of an entry; None = 0."""
        ...

    def __call__(
        self, query: Tensor, key: Tensor, hidden_states: Tensor, position: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Decides for every token.

        Args:
            query: (B, H, T, D) before rotary embedding.
            key: (B, K, T, D) before rotary embedding.
            hidden_states: (B, T, E), input of the attention layer.
            position: of the dial (`core.dial`); without a dial it means nothing.

        Returns:
            Merge logits (B, K, T) and omega (B, K, T) > 0, both float32.
        """
        ...


class LearnedPolicy(Protocol):
    """A method whose decisions are trained; a frozen dataclass under `register`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    """The name it is registered under."""

    @property
    def cr(self) -> float:
        """Target compression ratio, tokens seen / entries kept."""
        ...

    @property
    def delay(self) -> int:
        """Newest tokens that stay exact."""
        ...

    @property
    def window(self) -> int | None:
        """Most tokens one entry averages; None = no bound."""
        ...

    @property
    def decision(self) -> str:
        """Where decisions come from."""
        ...

    @property
    def per(self) -> str:
        """Who decides: each kv head, or a layer."""
        ...

    @property
    def neuron(self) -> int:
        """Channel that decides, where a decision reads one."""
        ...

    @property
    def kv_heads(self) -> int | None:
        """Kv heads left after mean pooling; None = all."""
        ...

    @property
    def max_cr(self) -> float | None:
        """Largest ratio of a dial; None = `cr` alone."""
        ...

    def build_decision(self, hidden_size: int, num_kv_heads: int, head_dim: int) -> nn.Module:
        """Makes the `Decision` of one attention layer."""
        ...

    def share(self, logits: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Applies what heads share to the merge logits and omega, (B, K, T) each."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns name and options, as `get_policy` takes them."""
        ...


Policy = LearnedPolicy | BudgetPolicy

_POLICIES: dict[str, type] = {}
_Policy = TypeVar("_Policy", bound=type)


def register(name: str) -> Callable[[_Policy], _Policy]:
    """Class decorator that makes a frozen dataclass known under `name`."""

    def add(policy: _Policy) -> _Policy:
        assert name not in _POLICIES, f"policy {name!r} registered twice"
        _POLICIES[name] = policy
        policy.name = name
        return policy

    return add


def list_policies() -> list[str]:
    """Names of all policies, sorted.

    >>> "dmc" in list_policies()
    True
    """
    return sorted(_POLICIES)


def policy_class(name: str) -> type:
    """Finds the dataclass of a policy, which some can't be made of without options.

    Raises:
        ValueError: unknown name, with the closest match.

    >>> policy_class("dmc").__name__
    'DMC'
    """
    if name not in _POLICIES:
        allowed = list_policies()
        raise ValueError(
            f"unknown policy {name!r}.{closest(name, allowed)} Available: {', '.join(allowed)}. "
            "See `cachefold ls policies`."
        )
    return _POLICIES[name]


def get_policy(name: str, **options: Any) -> Policy:
    """Builds a policy from its name and options.

    Raises:
        ValueError: unknown name or option, with the closest match.

    >>> get_policy("dmc", cr=4.0).cr
    4.0
    """
    policy = policy_class(name)
    known = [field.name for field in fields(policy)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"policy {name!r} has no option {option!r}.{closest(option, known)} "
                f"Options: {', '.join(known)}."
            )
    return policy(**options)
