"""Runs Python that a model wrote, with nothing it could harm.

What a program gets: an empty folder, no input, no network, no processes or threads of its own, a
share of time and memory. What stands behind it is said with each result, strongest first:

- `namespaces`: new user, process, network and mount namespaces; every file system is read-only but
  for a small disk in memory, and devices are shut; system calls are filtered (seccomp). The kernel
  stands for it.
- `seccomp`: where namespaces are not allowed, as in many containers: the filter of system calls,
  and an audit hook that refuses to write outside the folder. The filter can't see paths, so files
  outside are as safe as under `audit`. Compiled packages but numpy are not to be had.
- `audit`: the hook alone. It stops mistakes and plain attacks, not an expert, who can change the
  interpreter that runs the hook; threads may start, and two of them can race it.

Limits on time, memory, file size and open files hold in all three; what all files hold together is
bounded by the first alone. A program can read what the user can read; its environment is empty,
and only the result leaves it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cachefold.core.names import closest

Protection: TypeAlias = Literal["namespaces", "seccomp", "audit"]
PROTECTIONS: tuple[Protection, ...] = get_args(Protection)
"""From strongest to weakest."""

_ROOT = str(Path(__file__).parents[2])
_START = (
    "import sys; sys.path.insert(0, sys.argv[2]); "
    "from cachefold.evaluation.sandbox_child import main; sys.path.pop(0); main()"
)
_LEAST_MEMORY = 256 << 20
_REPORT_BYTES = 64 << 10
_CHUNK = 1 << 16
_PIPE_READS = 17
_SETUP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its last line without an error."""
    reason: str
    """`passed`, the error that ended it, `timeout`, or the signal that killed it."""
    output: str
    """Beginning of what it printed, errors included."""
    seconds: float
    """Wall time of the program, start of the interpreter not included."""
    protection: Protection
    """What was in force."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """Limits under which programs run.

    >>> Sandbox(timeout=20.0).run("assert 1 + 1 == 2").passed
    True
    >>> Sandbox(timeout=20.0).run("assert 1 + 1 == 3, 'no'").reason
    'AssertionError: no'
    """

    timeout: float = 10.0
    """Seconds of wall time; CPU time is limited to about the same."""
    memory: int = 1 << 30
    """Bytes of address space, the interpreter included."""
    output: int = 16 << 10
    """Bytes of output kept; the rest is read and thrown away."""
    protection: Protection | None = None
    """None = the strongest this machine allows."""

    def __post_init__(self) -> None:
        """Checks values."""
        if self.timeout <= 0 or self.output < 0:
            raise ValueError(
                f"timeout must be > 0 and output >= 0; got {self.timeout} and {self.output}"
            )
        if self.memory < _LEAST_MEMORY:
            raise ValueError(
                f"memory must be >= {_LEAST_MEMORY} bytes, which the interpreter needs for "
                f"itself; got {self.memory}"
            )
        if self.protection is not None and self.protection not in PROTECTIONS:
            raise ValueError(
                f"unknown protection {self.protection!r}.{closest(self.protection, PROTECTIONS)} "
                f"Available: {', '.join(PROTECTIONS)}."
            )

    def run(self, source: str) -> Outcome:
        """Runs a program in a process of its own.

        Args:
            source: Python. A program that ends early (`sys.exit`, `os._exit`) has not passed.

        Returns:
            How it ended. Errors of the program are not raised.

        Raises:
            RuntimeError: the sandbox could not be set up, so nothing ran.
        """
        protection = self.protection or best_protection()
        outcome = self._run(source, protection)
        if isinstance(outcome, str):
            raise RuntimeError(
                f"the sandbox ({protection}) could not be set up, so nothing was run: {outcome}"
            )
        return outcome

    def _run(self, source: str, protection: Protection) -> Outcome | str:
        """The outcome, or why the sandbox could not be set up."""
        token = secrets.token_hex(16)
        reader, writer = os.pipe()
        with _own_folder() as folder, open(reader, "rb") as pipe:
            # Surrogates can't be stored; such a program would not run anyway.
            text = source.encode("utf-8", errors="replace")
            Path(folder, "program.py").write_bytes(text)
            order = {
                "folder": folder, "report": writer, "token": token, "timeout": self.timeout,
                "memory": self.memory, "protection": protection,
            }  # fmt: skip
            try:
                process = _start(order)
            finally:
                os.close(writer)
            watched = _watch(process, pipe.fileno(), self)
        setup, *ends = watched.reports or [{"setup": f"it printed {watched.output!r}"}]
        if setup.get("setup", "") is not None:
            return str(setup.get("setup"))
        passed = ends[-1:] == [{"token": token}]
        reason = "passed" if passed else _reason(watched, ends, process.returncode)
        return Outcome(
            passed=passed, reason=reason, output=watched.output, seconds=watched.seconds,
            protection=protection,
        )  # fmt: skip


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """An empty folder that is gone afterwards, however deep a program has made it."""
    folder = tempfile.TemporaryDirectory(prefix="cachefold-")
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:
            subprocess.run(["rm", "-rf", "--", folder.name], check=True)


@dataclass(slots=True)
class _Watched:
    """What was seen of a process until it ended or was killed."""

    output: str
    reports: list[dict[str, Any]]
    seconds: float
    in_time: bool


@functools.cache
def best_protection() -> Protection:
    """The strongest protection this machine allows, tried once.

    Raises:
        RuntimeError: not Linux, or not even the weakest works; with the reasons.
    """
    refuse_other_systems()
    reasons = []
    for protection in PROTECTIONS:
        outcome = Sandbox(timeout=60.0)._run("", protection)
        if isinstance(outcome, Outcome):
            return protection
        reasons.append(f"{protection}: {outcome}")
    raise RuntimeError("no protection works on this machine; " + "; ".join(reasons))


def refuse_other_systems() -> None:
    """Says that programs of a model are run on Linux only.

    Raises:
        RuntimeError: another system.
    """
    if sys.platform != "linux":
        raise RuntimeError(
            f"programs written by a model run only on Linux, where they can be confined; this is "
            f"{sys.platform}. Run the code tasks in a Linux container, or leave them out with "
            f"--tasks."
        )


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    refuse_other_systems()
    environment = {
        "PATH": os.defpath, "HOME": order["folder"], "TMPDIR": order["folder"], "LANG": "C.UTF-8",
        # Threads are refused, so numeric libraries should not try.
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-I", "-B", "-X", "utf8", "-c", _START, json.dumps(order), _ROOT]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment, cwd="/", pass_fds=(order["report"],), start_new_session=True,
    )  # fmt: skip


def _watch(process: subprocess.Popen[bytes], pipe: int, limits: Sandbox) -> _Watched:
    """Reads output and reports until the process ends or its time is up, then kills its group."""
    assert process.stdout is not None
    printed = process.stdout.fileno()
    streams = {printed: bytearray(), pipe: bytearray()}
    keep = {printed: limits.output, pipe: _REPORT_BYTES}
    begin = time.monotonic()
    deadline, running = begin + _SETUP_SECONDS, False
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for handle in (*streams, ended):
                selector.register(handle, selectors.EVENT_READ)
            while True:
                left = max(0.0, deadline - time.monotonic())
                ready = {key.fd for key, _ in selector.select(left)}
                for handle in ready - {ended}:
                    if not _take(handle, streams[handle], keep[handle]):
                        selector.unregister(handle)
                if not running and streams[pipe]:
                    # The program starts now; getting there is not its time.
                    begin, running = time.monotonic(), True
                    deadline = begin + limits.timeout
                if ended in ready or left == 0.0:
                    break
    finally:
        # Not waited for yet, so the number of the group is still its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        os.close(ended)
        process.wait()
    seconds = time.monotonic() - begin
    with process.stdout:
        for handle, taken in streams.items():
            _take_rest(handle, taken, keep[handle])
    output = bytes(streams[printed]).decode("utf-8", errors="replace")
    return _Watched(output, _reports(streams[pipe]), seconds, ended in ready)


def _take(handle: int, taken: bytearray, keep: int) -> bool:
    """Reads once, keeps up to `keep` bytes in all; False at the end of the stream."""
    chunk = os.read(handle, _CHUNK)
    taken += chunk[: keep - len(taken)]
    return bool(chunk)


def _take_rest(handle: int, taken: bytearray, keep: int) -> None:
    """Reads what the pipe still holds, without waiting for more."""
    os.set_blocking(handle, False)
    with contextlib.suppress(BlockingIOError):
        # More than a pipe holds can only come from a writer that is still alive.
        for _ in range(_PIPE_READS):
            _take(handle, taken, keep)


def _reports(lines: bytearray) -> list[dict[str, Any]]:
    """What the child said; a program that wrote into its pipe gives no valid last line."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [report for report in found if isinstance(report, dict)]


def _reason(watched: _Watched, ends: list[dict[str, Any]], status: int) -> str:
    if ends and isinstance(ends[-1].get("detail"), str):
        return str(ends[-1]["detail"])
    if not watched.in_time:
        return "timeout"
    if status < 0 or status > 128:
        return f"killed by signal {-status if status < 0 else status - 128}"
    return f"ended before its last line, exit status {status}"
