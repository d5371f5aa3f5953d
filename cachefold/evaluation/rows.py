"""From what was measured of every method to the rows of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cachefold.core.accounting import compression_ratio
from cachefold.evaluation.methods import DENSE, Method

Parts = dict[str, Any]
"""What was measured of a method: `facts`, `heldout` by file, `context`, `tasks` by name."""


def rows(methods: Sequence[Method], parts: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """A row for every method that anything was measured of; what is missing is None.

    Args:
        methods: in the order of the report.
        parts: by name of the method.
    """
    dense = parts.get(DENSE, {}).get("heldout", {})
    return [_row(method, parts[method.name], dense) for method in methods if parts.get(method.name)]


def _row(method: Method, parts: Parts, dense: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": method.name, "policy": method.policy, "codec": method.codec,
        "cr_asked": method.cr, "artefact": parts.get("facts", {}).get("artefact"),
        "weights": parts.get("facts", {}).get("weights"),
    }  # fmt: skip
    row |= _loss(parts.get("heldout", {}), dense)
    row |= parts.get("context", {})
    return row | {"tasks": parts.get("tasks", {})}


def _loss(heldout: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and increase; only of methods that have all files the dense model has."""
    row: dict[str, Any] = dict.fromkeys(("cr", "loss", "increase", "increase_error"))
    row["files"] = {
        name: {
            "pieces": len(one["losses"]), "loss": statistics.fmean(one["losses"]),
            "losses": one["losses"], "cr": compression_ratio(one["tokens"], one["entries"]),
        }
        for name, one in heldout.items()
    }  # fmt: skip
    if not heldout or set(dense) - set(heldout):
        return row
    totals = [sum(one[name] for one in heldout.values()) for name in ("tokens", "entries")]
    row["cr"] = compression_ratio(*totals)
    row["loss"] = statistics.fmean(file["loss"] for file in row["files"].values())
    if set(dense) == set(heldout):
        found = increase(*({n: one["losses"] for n, one in x.items()} for x in (heldout, dense)))
        for name, one in found.pop("files").items():
            row["files"][name] |= one
        row |= found
    return row


def increase(
    losses: Mapping[str, Sequence[float]], dense: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Loss over dense on the same pieces: mean over files, each the mean over its pieces.

    Args:
        losses: nats/token of every piece, by file.
        dense: of the dense model.

    Returns:
        `increase` and its standard error `increase_error`, from the differences of paired pieces
        (None where a file has a single piece), and both by file in `files`.

    >>> found = increase({"a": [2.0, 4.0]}, {"a": [1.5, 3.3]})
    >>> round(found["increase"], 6), round(found["increase_error"], 6)
    (0.6, 0.1)
    """
    files = {}
    for name, mine in losses.items():
        differences = [a - b for a, b in zip(mine, dense[name], strict=True)]
        count = len(differences)
        files[name] = {
            "increase": statistics.fmean(differences),
            "increase_error": statistics.stdev(differences) / math.sqrt(count)
            if count > 1 else None,
        }  # fmt: skip
    errors: list[Any] = [one["increase_error"] for one in files.values()]
    together = None if None in errors else math.hypot(*errors) / len(errors)
    return {
        "increase": statistics.fmean(one["increase"] for one in files.values()),
        "increase_error": together,
        "files": files,
    }
