"""lm-eval on tasks of this machine."""

from __future__ import annotations

from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def run(model: Any, task: dict[str, Any], **options: Any) -> dict[str, Any]:
    """As lm-eval's command, without the tasks it ships, which take long to index."""
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
        log_samples=True, **options,
    )  # fmt: skip


def evaluated(model: Any, task: dict[str, Any], **options: Any) -> tuple[dict, list[dict]]:
    """Results of lm-eval, and its samples in order."""
    found = run(model, task, **options)
    [samples] = found["samples"].values()
    return found, sorted(samples, key=lambda sample: sample["doc_id"])
