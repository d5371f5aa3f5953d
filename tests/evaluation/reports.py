"""A made-up report, as `cachefold eval` writes them."""

from __future__ import annotations

from typing import Any

MEBI = 1024 * 1024


def row(name: str, mib: float | None, increase: float | None, **more: Any) -> dict[str, Any]:
    policy, _, codec = name.partition("+")
    policy, _, cr = policy.partition("-cr")
    return {
        "name": name, "policy": policy, "codec": codec or None,
        "cr_asked": float(cr) if cr else None, "artefact": None, "weights": None,
        "cr": float(cr or 1), "loss": None if increase is None else 3 + increase,
        "increase": increase, "increase_error": None if increase is None else 0.002,
        "files": {}, "tasks": {}, "cache_bytes": mib and mib * MEBI,
        "dense_cache_bytes": 45 * MEBI, "tokens_per_s": 20.0,
    } | more  # fmt: skip


def task(value: float, **more: Any) -> dict[str, Any]:
    return {
        "metric": "acc", "higher_is_better": True, "value": value, "error": 0.02, "count": 100,
    } | more  # fmt: skip


def report() -> dict[str, Any]:
    rows = [
        row("dense", 45, 0.0, tasks={"piqa": task(0.68, cr=1.0)}),
        row("tova-cr2", 22.5, 0.1, tasks={"piqa": task(0.63, cr=1.6)}),
        row("tova-cr8", 5.6, 0.5, tasks={"piqa": task(0.54, error=None)}),
        row("full+int4", 13, 0.02, tasks={"piqa": task(0.67)}),
        row("random-cr8", 5.6, 2.2),
        row("h2o-cr2", None, None),
    ]
    return {
        "command": "cachefold eval --against tova", "seed": 0, "rows": rows, "notes": [],
        "files": ["chat", "code"], "tasks": ["piqa"],
        "failures": [{"method": "h2o-cr2", "part": "method", "reason": "it broke"}],
        "settings": {
            "model": "m", "dtype": "float32", "seed": 0, "pieces": 6, "tokens": 1024,
            "context": 2048,
        },
        "environment": {
            "cpu": "a CPU", "gpu": None, "threads": 2, "cachefold": "0", "commit": "abc",
            "torch": "2", "transformers": "5",
        },
    }  # fmt: skip
