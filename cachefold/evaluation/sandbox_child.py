"""The process in which `evaluation.sandbox` runs a program. Standard library only.

It is told what to do by one JSON argument, takes away its own powers, says so through a pipe,
runs the program, and says how it ended.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from cachefold.evaluation import sandbox_hook, sandbox_kernel

_DISK = 64 << 20
_OPEN_FILES = 64
_DETAIL = 300


def main() -> None:
    """Reads the order from the command line and never returns."""
    order = json.loads(sys.argv[1])
    source = Path(order["folder"], "program.py").read_text(encoding="utf-8")
    sandbox_kernel.die_with_parent()
    try:
        if order["protection"] == "namespaces":
            sandbox_kernel.unshare()
            if (child := os.fork()) != 0:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                os._exit(status if status >= 0 else 128 - status)
            sandbox_kernel.die_with_parent()
            sandbox_kernel.hide_disk(order["folder"], _DISK)
        os.chdir(order["folder"])
        _confine(order)
    except OSError as error:
        _report(order, setup=str(error))
        os._exit(1)
    _report(order, setup=None)
    detail = _run(source)
    sys.stdout.flush()
    sys.stderr.flush()
    _report(order, **({"token": order["token"]} if detail is None else {"detail": detail}))
    os._exit(0)


def _confine(order: dict[str, Any]) -> None:
    """Limits, then the filter of calls, then the hook; what is in force is in `order`."""
    seconds = int(order["timeout"]) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_FSIZE, _DISK),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))
    sandbox_kernel.drop_capabilities()
    if order["protection"] != "audit":
        sandbox_kernel.filter_calls()
    if order["protection"] != "namespaces":
        sandbox_hook.install(order["folder"])


def _report(order: dict[str, Any], **fields: str | None) -> None:
    os.write(order["report"], json.dumps(fields).encode() + b"\n")


def _run(source: str) -> str | None:
    """Runs the program to its end; returns why that failed, or None."""
    sys.argv, sys.stdin = ["program.py"], open(os.devnull)
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except MemoryError:
        return "MemoryError"
    except BaseException as error:  # SystemExit too: it may have come before the tests
        return f"{type(error).__name__}: {_text_of(error)}".removesuffix(": ")[:_DETAIL]
    return None


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a program may define what its errors print
        return "?"
