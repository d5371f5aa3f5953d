"""Methods: what `cachefold eval` compares, and how a model becomes each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from cachefold.core.dial import DEFAULT_PRESET, Dial
from cachefold.models.fold import folded, unfold
from cachefold.models.hub import WEIGHTS, file_digest, load_folded, read_config
from cachefold.policies import get_policy, policy_class
from cachefold.policies.base import Policy
from cachefold.policies.budget import BudgetPolicy

DENSE = "dense"
KEEP_ALL = "full"
"""The policy that keeps every entry: it carries a codec and needs no artefact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One line of a comparison.

    >>> Method(name="full+int4", policy="full", codec="int4").artefact is None
    True
    """

    name: str
    """As the table shows it; folders of results are called like this."""
    policy: str
    """`dense`, or a policy."""
    cr: float | None = None
    """Ratio asked for, tokens seen / entries kept; None where nothing is left out."""
    codec: str | None = None
    """How entries are stored; None = in the dtype of the model."""
    artefact: Path | None = None
    """Folder of the learned weights."""
    dial: bool = False
    """Whether `cr` is set on the dial of the artefact."""

    def facts(self) -> dict[str, Any]:
        """What the method is, for reports and for telling stored results apart."""
        weights = None if self.artefact is None else file_digest(self.artefact / WEIGHTS)
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        found["artefact"] = None if self.artefact is None else str(self.artefact)
        return found | {"weights": weights, "position": self._position()}

    def _position(self) -> float | None:
        """Of the dial at its ratio, which `cachefold calibrate` may change."""
        if self.artefact is None or self.cr is None or not self.dial:
            return None
        tables = read_config(self.artefact).get("dial", {})
        return Dial(tables, DEFAULT_PRESET).position(self.cr)


@contextmanager
def applied(method: Method, model: PreTrainedModel, seed: int = 0) -> Iterator[PreTrainedModel]:
    """Makes a dense model the method for the length of a `with` block, without its codec.

    Args:
        method: what it becomes.
        model: dense.
        seed: of policies that draw.

    Raises:
        ValueError: the policy or artefact doesn't fit the model, which is then as it was.
    """
    if method.policy == DENSE:
        yield model
    elif method.artefact is None:
        with folded(model, _policy(method.policy, method.cr, seed)):
            yield model
    else:
        with _with_artefact(method.artefact, model, method.cr if method.dial else None):
            yield model


@contextmanager
def _with_artefact(
    folder: Path, model: PreTrainedModel, cr: float | None
) -> Iterator[PreTrainedModel]:
    """Loads an artefact; base weights that it brings along are put back at the end."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        trained = set(file.keys())
    parameters = dict(model.named_parameters())
    frozen = {name: parameter.requires_grad for name, parameter in parameters.items()}
    before = {name: parameters[name].detach().clone() for name in trained & set(parameters)}
    device: Any = model.device
    load_folded(folder, model, cr=cr)
    model.to(device)  # the decision modules and adapters that came with it
    try:
        yield model
    finally:
        unfold(model)
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
        for name, parameter in parameters.items():
            parameter.requires_grad_(frozen[name])


def has_ratio(policy: str) -> bool:
    """True for policies that are asked for a ratio.

    >>> has_ratio("tova"), has_ratio("full")
    (True, False)
    """
    return "cr" in _options(policy)


def is_learned(policy: str) -> bool:
    """True for policies that need the weights of a retrofit.

    >>> [is_learned(policy) for policy in ("dmc", "gqa", "tova", "full")]
    [True, True, False, False]
    """
    return policy != KEEP_ALL and not issubclass(policy_class(policy), BudgetPolicy)


def _policy(name: str, cr: float | None, seed: int) -> Policy:
    asked = {"cr": cr, "seed": seed}
    return get_policy(name, **{key: asked[key] for key in asked if key in _options(name)})


def _options(policy: str) -> set[str]:
    return {field.name for field in fields(policy_class(policy))}
