"""An audit hook that refuses what a program may not do. Standard library only.

Weaker than the kernel, since it is Python inside the program's own interpreter. It sees what Python
announces (PEP 578); of the rest it takes away what is known to reach outside. A program that
changes the interpreter under it gets round it: one that replaces functions of `os.path` or
`builtins`, finds the hook through a traceback or `gc`, or makes bytecode of its own. So it stops
mistakes and plain attacks, not somebody who knows the interpreter well.
"""

from __future__ import annotations

import fcntl
import os
import posix
import stat
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_WRITING_MODES = frozenset("wax+")
_DEVICES = frozenset({"/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"})
_REFUSED = frozenset(
    {
        # A new interpreter has no hook, a symbolic link is followed by whoever removes the folder,
        # and `ioctl` changes files through handles that only read.
        "cpython.PyInterpreterState_New", "fcntl.ioctl", "os.symlink",
        "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn",
        "os.system", "pty.spawn", "resource.prlimit", "resource.setrlimit", "sqlite3.connect",
        "subprocess.Popen", "syslog.syslog",
    }
)  # fmt: skip
_REFUSED_FAMILIES = ("ctypes.", "socket.", "ftplib.", "http.", "imaplib.", "smtplib.")
# They write files or start processes unannounced; `posix` would come back whole.
_REFUSED_MODULES = frozenset(
    {
        "_ctypes", "_dbm", "_gdbm", "_multiprocessing", "_posixshmem", "_posixsubprocess",
        "_tkinter", "posix", "readline",
    }
)  # fmt: skip
# Whose compiled modules may be loaded: what others write to is not announced.
_COMPILED = sys.stdlib_module_names | {"numpy"}
# How many of the first arguments are paths or handles that are changed.
_CHANGING = {
    "os.chflags": 1, "os.chmod": 1, "os.chown": 1, "os.lchmod": 1, "os.link": 2,
    "os.mkdir": 1, "os.remove": 1, "os.removexattr": 1, "os.rename": 2, "os.rmdir": 1,
    "os.setxattr": 1, "os.truncate": 1, "os.utime": 1,
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

    Refused are processes, sockets, signals, `ctypes`, compiled modules but Python's own and
    numpy's, symbolic links, handles on folders and devices, and changing anything outside `folder`.
    Threads are not announced by every Python, so they are not refused. It can't be taken back.

    Args:
        folder: where files may be written.
    """
    root = os.path.realpath(folder)
    homes = tuple(os.path.abspath(home) for home in sys.path)
    _take_away()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            allowed = _may_open(root, *arguments)
        elif event in _CHANGING:
            allowed = all(_is_within(root, path) for path in arguments[: _CHANGING[event]])
        elif event == "import":
            allowed = _may_import(homes, *arguments[:2])
        elif event == "fcntl.fcntl":
            allowed = arguments[1] not in _REFUSED_CONTROLS
        else:
            allowed = event not in _REFUSED and not event.startswith(_REFUSED_FAMILIES)
        if not allowed:
            error = ImportError if event == "import" else PermissionError
            raise error(f"the sandbox refuses {event}{arguments[:2]}")

    sys.addaudithook(hook)


def _take_away() -> None:
    """Removes what a program could use without the hook being asked."""
    for name in _UNANNOUNCED:
        for module in (os, posix):
            if hasattr(module, name):
                setattr(module, name, _refuse)
    # Handles on folders are refused, so `shutil` should not try. The set holds `os.mknod`, too.
    os.supports_dir_fd.clear()
    # Loaded by the sandbox itself, so they would not be announced again.
    for name in tuple(sys.modules):
        if name.partition(".")[0] in ("_ctypes", "cachefold", "ctypes"):
            del sys.modules[name]


def _refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError("the sandbox refuses this function")


def _may_open(root: str, path: Any, mode: str | None, flags: int) -> bool:
    if type(path) is int:
        return True  # open already, so it was allowed
    place = _place(path)
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        kind = stat.S_IFREG  # not there, or soon to be
    # With a handle on a folder, `dir_fd` would give paths another meaning than the announced one.
    # `open` itself refuses folders; with a mode they are only named there, as by `tempfile`.
    reads = flags & os.O_PATH or not flags & (os.O_WRONLY | os.O_RDWR)
    if place is None or (kind == stat.S_IFDIR and mode is None and reads):
        return False
    if place in _DEVICES:
        return True
    if flags & _WRITING or (mode is not None and not _WRITING_MODES.isdisjoint(mode)):
        return place == root or place.startswith(root + os.sep)
    return kind in (stat.S_IFREG, stat.S_IFDIR)


def _is_within(root: str, path: Any) -> bool:
    place = _place(path)
    return place is not None and place.startswith(root + os.sep)


def _place(path: Any) -> str | None:
    """Where a path or handle leads; None for a type that could tell Python another place."""
    if type(path) is int:
        # That a handle is open says nothing: one that only reads is enough to change the mode.
        return os.readlink(f"/proc/self/fd/{path}")
    return os.path.realpath(os.fsdecode(path)) if type(path) in (bytes, str) else None


def _may_import(homes: Sequence[str], name: str, file: Any) -> bool:
    """Whether a module may be looked for, or, given its file, a compiled one be loaded."""
    if file is None:
        return name not in _REFUSED_MODULES
    # By its file, since a program chooses the name; its own files are not among the homes.
    place = os.path.abspath(file) if type(file) is str else ""
    if os.path.basename(place).partition(".")[0] in _REFUSED_MODULES:
        return False
    return any(
        place.startswith(home + os.sep)
        and place[len(home) + 1 :].partition(os.sep)[0].partition(".")[0] in _COMPILED
        for home in homes
    )
