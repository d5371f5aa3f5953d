"""What the Linux kernel can take away from the process that runs a program. Standard library only.

All of it works without privileges where the kernel allows user namespaces. Calls go through
`ctypes`, since Python 3.11 knows neither `unshare` nor `seccomp`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC, _NEW_NS = (
    0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000,
)  # fmt: skip
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_DEVICES = ("/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9
_INSIDE_UID = 1000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
# Calls that start processes or threads, open sockets, make devices and named pipes, reach other
# processes or leave the group.
_REFUSED = {
    "x86_64": (
        41, 56, 57, 58, 59, 101, 109, 112, 129, 133, 141, 142, 144, 155, 161, 165, 166, 200, 203,
        248, 249, 250, 259, 272, 297, 298, 308, 310, 311, 314, 321, 322, 323, 424, 425, 428, 429,
        430, 434, 435, 442,
    ),
    "aarch64": (
        33, 39, 40, 41, 51, 97, 117, 118, 119, 122, 130, 138, 140, 154, 157, 198, 217, 218, 219,
        220, 221, 240, 241, 268, 270, 271, 274, 280, 281, 282, 424, 425, 428, 429, 430, 434, 435,
        442,
    ),
}  # fmt: skip
# kill and tgkill: allowed towards the process itself, which `abort` needs.
_TO_ITSELF = {"x86_64": (62, 234), "aarch64": (129, 131)}

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000 | errno.EPERM


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, however it ends."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def unshare() -> None:
    """New user, process, network, message and mount namespaces; the next child is process 1.

    Raises:
        OSError: the kernel or its policy refuses.
    """
    uid, gid = os.getuid(), os.getgid()
    flags = _NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_NS
    _check(_libc().unshare(flags), "unshare")
    # Not user 0 inside: then nothing gives capabilities back.
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_INSIDE_UID} {uid} 1"),
        ("gid_map", f"{_INSIDE_UID} {gid} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as target:
            target.write(text)


def hide_disk(folder: str, size: int) -> None:
    """Makes every file system read-only but `folder`, which becomes an empty disk in memory.

    Devices can be written on a read-only file system, so none can be opened but `/dev/null` and
    its like. Named pipes made by others can be, and only their permissions protect them.

    Args:
        folder: an existing folder.
        size: bytes it may hold.

    Raises:
        OSError: the kernel or its policy refuses.
    """
    libc = _libc()

    def mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes = b"") -> int:
        return int(libc.mount(source, target.encode(), kind, ctypes.c_ulong(flags), data))

    _check(mount(b"none", "/", None, _REC | _PRIVATE), "mount(private)")
    devices = [device for device in _DEVICES if os.path.exists(device)]
    for device in devices:
        # A mount of its own, which can be excepted.
        _check(mount(device.encode(), device, None, _BIND), f"mount({device})")
    _set_mount("/", _AT_RECURSIVE, add=_READ_ONLY | _NODEV, clear=0)
    for device in devices:
        _set_mount(device, 0, add=0, clear=_NODEV)
    limits = f"size={size},nr_inodes=4096,mode=0700".encode()
    _check(mount(b"tmpfs", folder, b"tmpfs", _NOSUID | _NODEV, limits), "mount(tmpfs)")
    # Where /proc can't be had anew, as in many containers, nothing is there instead.
    if mount(b"proc", "/proc", b"proc", _NOSUID | _NODEV) != 0:
        empty = b"size=4096,mode=0500"
        _check(mount(b"tmpfs", "/proc", b"tmpfs", _NOSUID | _NODEV | 1, empty), "mount(/proc)")


def _set_mount(path: str, flags: int, *, add: int, clear: int) -> None:
    attributes = struct.pack("=QQQQ", add, clear, 0, 0)
    done = _libc().syscall(
        ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(_AT_FDCWD), path.encode(),
        ctypes.c_long(flags), attributes, ctypes.c_size_t(len(attributes)),
    )  # fmt: skip
    _check(done, f"mount_setattr({path})")


def drop_capabilities() -> None:
    """Gives up all capabilities for good.

    Raises:
        OSError: the kernel refuses.
    """
    libc = _libc()
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    version_3 = struct.pack("=Ii", 0x20080522, 0)
    _check(libc.capset(version_3, struct.pack("=6I", *[0] * 6)), "capset")


def filter_calls() -> None:
    """Refuses, with EPERM, the system calls a program of functions and tests doesn't need.

    Needs `drop_capabilities` before it. New processes, new threads, sockets, new devices and named
    pipes, tracing, mounts, scheduling, signals to others by `kill` and other sessions are refused;
    see seccomp(2). The filter can't see paths, nor what a handle was opened for.

    Raises:
        OSError: the kernel refuses, or the architecture is not known here.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    code = b"".join(struct.pack("=HBBI", *step) for step in _filter(machine, os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    done = _libc().prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)
    _check(done, "prctl(PR_SET_SECCOMP)")


def _filter(machine: str, own: int) -> list[tuple[int, int, int, int]]:
    """(operation, steps to skip if true, if false, operand) of the filter."""
    refused, to_itself = _REFUSED[machine], _TO_ITSELF[machine]
    # Behind the tests: [allow] [compare the first argument: 2 steps] [fail].
    steps = [(_LOAD, 0, 0, _ARCHITECTURE)]
    tests = [(_AT_LEAST, _X32), *((_EQUAL, n) for n in refused)]
    left = len(tests) + len(to_itself)
    steps += [(_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _FAIL)]
    steps += [(_LOAD, 0, 0, _NUMBER)]
    for operation, operand in tests:
        left -= 1
        steps.append((operation, left + 4, 0, operand))
    for operand in to_itself:
        left -= 1
        steps.append((_EQUAL, left + 1, 0, operand))
    return [
        *steps,
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, own),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL),
    ]
