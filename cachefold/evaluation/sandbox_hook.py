"""An audit hook that refuses what a program may not do. Standard library only.

Weaker than the kernel: it sees what the standard library announces (PEP 578), so it stops
mistakes and plain attacks, not somebody who knows the interpreter well.
"""

from __future__ import annotations

import fcntl
import os
import posix
import sys
from typing import Any, NoReturn

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = frozenset(
    {
        # It changes files through handles that only read.
        "fcntl.ioctl",
        "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
        "os.system", "pty.spawn", "resource.prlimit", "resource.setrlimit", "sqlite3.connect",
        "subprocess.Popen", "syslog.syslog",
    }
)  # fmt: skip
_REFUSED_FAMILIES = ("ctypes.", "socket.", "ftplib.", "http.", "imaplib.", "smtplib.")
# `posix` would come back whole.
_REFUSED_MODULES = frozenset(
    {
        "_ctypes", "_dbm", "_gdbm", "_multiprocessing", "_posixshmem", "_posixsubprocess",
        "posix",
    }
)  # fmt: skip
# How many of the first arguments are paths or handles that are changed.
_CHANGING = {
    "os.chflags": 1, "os.chmod": 1, "os.chown": 1, "os.lchmod": 1, "os.link": 2,
    "os.mkdir": 1, "os.remove": 1, "os.removexattr": 1, "os.rename": 2, "os.rmdir": 1,
    "os.setxattr": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip
# Signals to the owner of a handle and leases reach other processes; 15 is F_SETOWN_EX.
_REFUSED_CONTROLS = frozenset({fcntl.F_SETOWN, 15, fcntl.F_SETLEASE})
# Not announced, and they make files or reach other processes.
_UNANNOUNCED = (
    "mkfifo", "mknod", "pidfd_open", "sched_setaffinity", "sched_setparam", "sched_setscheduler",
    "setpriority",
)  # fmt: skip


def install(folder: str) -> None:
    """From now on this interpreter raises PermissionError where a program leaves its place.

    Refused are processes, sockets, signals, `ctypes`, and changing anything outside `folder`.
    Threads are not announced by every Python, so they are not refused. It can't be taken back.

    Args:
        folder: where files may be written.
    """
    root = os.path.realpath(folder)
    for name in _UNANNOUNCED:
        for module in (os, posix):
            if hasattr(module, name):
                setattr(module, name, _refuse)

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            # That a handle is open says nothing: one that only reads is enough to change the mode.
            path = os.readlink(f"/proc/self/fd/{path}")
        place = os.path.realpath(os.fsdecode(path))
        return place == root or place.startswith(root + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            # A handle on a folder would make paths relative to it look harmless.
            # A handle is open already, so it was allowed.
            named = not isinstance(path, int)
            if named and (flags & _WRITING or os.path.isdir(path)) and not inside(path):
                raise PermissionError(f"the sandbox refuses to open {path!r}")
        elif event in _CHANGING:
            if not all(map(inside, arguments[: _CHANGING[event]])):
                raise PermissionError(f"the sandbox refuses {event}{arguments!r}")
        elif event == "import":
            if arguments[0] in _REFUSED_MODULES:
                raise ImportError(f"the sandbox refuses to import {arguments[0]}")
        elif event == "fcntl.fcntl" and arguments[1] in _REFUSED_CONTROLS:
            raise PermissionError(f"the sandbox refuses {event}{arguments!r}")
        elif event in _REFUSED or event.startswith(_REFUSED_FAMILIES):
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError("the sandbox refuses this function")
