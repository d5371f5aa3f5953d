"""An audit hook that refuses what a program may not do. Standard library only.

Weaker than the kernel: it sees what the standard library announces (PEP 578), so it stops
mistakes and plain attacks, not somebody who knows the interpreter well.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = frozenset(
    {
        "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
        "os.system", "pty.spawn", "resource.prlimit", "resource.setrlimit", "sqlite3.connect",
        "subprocess.Popen", "syslog.syslog",
    }
)  # fmt: skip
_REFUSED_FAMILIES = ("ctypes.", "socket.", "ftplib.", "http.", "imaplib.", "smtplib.")
_REFUSED_MODULES = frozenset(
    {"_ctypes", "_dbm", "_gdbm", "_multiprocessing", "_posixshmem", "_posixsubprocess"}
)
# How many of the first arguments are paths that are changed.
_CHANGING = {
    "os.chflags": 1, "os.chmod": 1, "os.chown": 1, "os.lchmod": 1, "os.link": 2,
    "os.mkdir": 1, "os.remove": 1, "os.removexattr": 1, "os.rename": 2, "os.rmdir": 1,
    "os.setxattr": 1, "os.symlink": 2, "os.truncate": 1, "os.utime": 1,
}  # fmt: skip


def install(folder: str) -> None:
    """From now on this interpreter raises PermissionError where a program leaves its place.

    Refused are processes, sockets, signals, `ctypes`, and changing anything outside `folder`.
    Threads are not announced by every Python, so they are not refused. It can't be taken back.

    Args:
        folder: where files may be written.
    """
    root = os.path.realpath(folder)

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # open already, so it was allowed
        place = os.path.realpath(os.fsdecode(path))
        return place == root or place.startswith(root + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            # A handle on a folder would make paths relative to it look harmless.
            if (flags & _WRITING or _is_folder(path)) and not inside(path):
                raise PermissionError(f"the sandbox refuses to open {path!r}")
        elif event in _CHANGING:
            if not all(map(inside, arguments[: _CHANGING[event]])):
                raise PermissionError(f"the sandbox refuses {event}{arguments!r}")
        elif event == "import":
            if arguments[0] in _REFUSED_MODULES:
                raise ImportError(f"the sandbox refuses to import {arguments[0]}")
        elif event in _REFUSED or event.startswith(_REFUSED_FAMILIES):
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)


def _is_folder(path: Any) -> bool:
    return not isinstance(path, int) and os.path.isdir(path)
