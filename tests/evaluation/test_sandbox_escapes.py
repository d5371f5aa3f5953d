"""Hostile programs reach nothing outside and leave nothing behind, under each protection."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cachefold.evaluation.sandbox import PROTECTIONS, Sandbox, best_protection
from tests.evaluation.boxes import ON_LINUX, lost, refusal

pytestmark = ON_LINUX
ROOT = str(Path(__file__).parents[2])


@pytest.mark.parametrize(
    "start",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.system('true') == 0 or 1 / 0",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ],
)
def test_no_second_process_starts(box, start):
    lost(box, start)


def test_no_thread_starts():
    lost(
        Sandbox(timeout=20.0, protection=best_protection()),
        "import threading\nthreading.Thread(target=print).start()",
    )


def test_files_outside_the_folder_are_not_written(box, tmp_path):
    target, link = tmp_path / "kept", tmp_path / "new"
    target.write_text("kept")
    for attempt in (
        f"open({str(target)!r}, 'w').write('x')",
        f"open({str(target)!r}, 'a').write('x')",
        f"open({str(link)!r}, 'x').write('x')",
        f"import os; os.remove({str(target)!r})",
        f"import os; os.rename({str(target)!r}, 'mine')",
        f"import os; os.chmod({str(target)!r}, 0)",
        f"import os; os.truncate({str(target)!r}, 0)",
        f"import os; os.mkdir({str(link)!r})",
        f"import os; os.symlink({str(target)!r}, 'l'); open('l', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import pathlib; pathlib.Path({str(tmp_path)!r}, '..', 'up').write_text('x')",
        f"import os; d = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "os.open('kept', os.O_WRONLY | os.O_TRUNC, dir_fd=d)",
        f"import sqlite3; sqlite3.connect({str(link)!r}).execute('create table t (x)')",
        f"import os; os.mknod({str(link)!r})",
        f"import os; os.mkfifo({str(link)!r})",
    ):
        lost(box, attempt)
    assert os.listdir(tmp_path) == ["kept"] and target.read_text() == "kept"
    assert not (tmp_path.parent / "up").exists()


def test_files_outside_the_folder_are_not_changed_through_a_handle(box, tmp_path):
    target = tmp_path / "kept"
    target.write_text("kept")
    before = _state(target)
    for change in (
        "os.chmod(f, 0o640)",
        "os.fchmod(f, 0o640)",
        "os.chown(f, -1, os.getgid())",
        "os.utime(f, (1, 1))",
        "os.setxattr(f, 'user.x', b'x')",
        "os.truncate(f, 0)",
        "fcntl.ioctl(f, 0x40086602, b'\\x40' + bytes(7))",  # FS_IOC_SETFLAGS: no dump
        "mmap.mmap(f, 4, access=mmap.ACCESS_WRITE)[0] = 1",
        "open(f'/proc/self/fd/{f}', 'w')",
    ):
        opened = f"import fcntl, mmap, os\nf = os.open({str(target)!r}, os.O_RDONLY)\n"
        assert "NameError" not in lost(box, opened + change).reason
        assert _state(target) == before and target.read_text() == "kept", change


def _state(path):
    found = os.stat(path)
    return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_ctime_ns


def test_devices_are_not_opened(box):
    ours, theirs = os.openpty()
    try:
        for flags in ("os.O_RDONLY", "os.O_WRONLY", "os.O_RDWR"):
            lost(box, f"import os; os.open({os.ttyname(theirs)!r}, {flags} | os.O_NOCTTY)")
    finally:
        os.close(ours)
        os.close(theirs)
    assert box.run("open('/dev/null', 'w').write('x'); open('/dev/urandom', 'rb').read(1)").passed


def test_the_folder_can_be_written_and_goes_away(box):
    source = "import os, tempfile\nopen('a', 'w').write('x')\nprint(os.path.realpath('a'))\n"
    source += "os.mkdir('d'); tempfile.TemporaryFile().write(b'x'); os.remove('a')"
    outcome = box.run(source)
    assert outcome.passed and not Path(outcome.output.strip()).parent.exists()


def test_usual_work_with_files_is_allowed(box):
    outcome = box.run(
        "import os, pathlib, shutil, tempfile\n"
        "with tempfile.TemporaryDirectory() as d: pathlib.Path(d, 'a').write_text('x')\n"
        "p = pathlib.Path('b/c'); p.mkdir(parents=True); p.joinpath('f').touch()\n"
        "shutil.copytree('b', 'e'); os.rename('b', 'g'); shutil.rmtree('g')\n"
        "f = os.open('e/c/f', os.O_RDWR); os.fchmod(f, 0o600); os.ftruncate(f, 9); os.utime(f)\n"
        "assert os.path.exists('e/c/f') and not os.path.exists('g')"
    )
    assert outcome.passed, outcome


def test_a_folder_deeper_than_the_stack_goes_away(box, tmp_path, monkeypatch, request):
    # Were it left, pytest could not remove it either.
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", str(tmp_path)], check=True))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert box.run("import os\nfor _ in range(2000): os.mkdir('d'); os.chdir('d')").passed
    assert os.listdir(tmp_path) == []


def test_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        address = server.getsockname()
        lost(box, f"import socket; socket.create_connection({address!r}, 5)")
        lost(box, "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
        lost(box, "import socket; socket.socket(socket.AF_UNIX)")
        url = f"http://127.0.0.1:{address[1]}"
        lost(box, f"import urllib.request; urllib.request.urlopen({url!r})")
        with pytest.raises(BlockingIOError):
            server.accept()


# The kernel sends the owner of a pipe a signal of our choice (F_SETSIG, 10) when it is written.
OWNED = """
import fcntl, os, struct
r, w = os.pipe()
fcntl.fcntl(r, {owner})
fcntl.fcntl(r, 10, 9)
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b"x")
"""


def test_signals_do_not_reach_others(box):
    other = subprocess.Popen(["sleep", "60"])
    try:
        for target in (os.getpid(), other.pid, -1):
            box.run(f"import os\nos.kill({target}, 9)")
            box.run(f"import os\nos.kill(os.getppid() or {target}, 9)")
        lost(box, f"import os\nos.killpg({os.getpgid(0)}, 9)")
        lost(box, f"import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({other.pid}), 9)")
        lost(box, OWNED.format(owner=f"fcntl.F_SETOWN, {other.pid}"))
        lost(box, OWNED.format(owner=f"15, struct.pack('2i', 1, {other.pid})"))  # F_SETOWN_EX
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    "call",
    ["setpriority(os.PRIO_PROCESS, 0, 19)", "sched_setaffinity(0, os.sched_getaffinity(0))",
     "sched_setparam(0, os.sched_param(0))", "sched_setscheduler(0, 0, os.sched_param(0))"],
)  # fmt: skip
def test_priorities_are_not_changed(box, call):
    lost(box, f"import os\nos.{call}")


def test_the_environment_is_not_passed_on(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    outcome = box.run("import os; print(os.environ); print(open('/proc/self/environ').read())")
    assert outcome.passed and "s3cret" not in outcome.output


RAW = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
assert libc.{call} == -1 and ctypes.get_errno() == 1, ctypes.get_errno()
"""


# Where libc has a newer call, or none: mknod and sched_setattr.
BARE = [
    "syscall(133, b'x', 0o10600, 0)",
    "syscall(314, 0, struct.pack('IIQi28x', 48, 3, 0, 19), 0)",
]


@pytest.mark.parametrize(
    "call",
    ["fork()", "setsid()", "kill(os.getppid() or 2, 0)", "socket(2, 1, 0)", "unshare(0x10000000)",
     "ptrace(0, 0, 0, 0)", "mount(b'none', b'/tmp', b'tmpfs', 0, b'')", "chroot(b'.')",
     "mkfifo(b'x', 0o600)", "sched_setscheduler(0, 0, ctypes.byref(ctypes.c_int(0)))",
     *(BARE if platform.machine() == "x86_64" else ())],
)  # fmt: skip
def test_the_kernel_itself_refuses(call):
    if refusal("namespaces") is not None:
        pytest.skip("no namespaces here")
    outcome = Sandbox(timeout=20.0, protection="namespaces").run(RAW.format(call=call))
    assert outcome.passed, outcome


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    except OSError:
        return False


def _children():
    return _descendants(os.getpid())


def _descendants(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")")[-1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(stat.parent.name), *_descendants(int(stat.parent.name))]
    return sorted(found)


def test_nothing_outlives_a_run(box):
    before = _children()
    lost(Sandbox(timeout=0.5, protection=box.protection), "while True: pass")
    assert _children() == before


def test_programs_die_with_the_one_who_started_them(box, tmp_path):
    source = f"""
import sys, threading, time
sys.path.insert(0, {ROOT!r})
from cachefold.evaluation.sandbox import Sandbox
box = Sandbox(timeout=60.0, protection={box.protection!r})
threading.Thread(target=box.run, args=("import os\\nwhile True: pass  # marker",)).start()
time.sleep(3)
"""
    # Killed, it can't clean up.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", source], env=environment)
    time.sleep(2.5)
    deep = _descendants(owner.pid)
    assert deep
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while any(map(_alive, deep)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, deep))


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root can")
def test_nobody_can_use_it_too():
    source = f"""
import sys
sys.path.insert(0, {ROOT!r})
from cachefold.evaluation.sandbox import Sandbox, best_protection
box = Sandbox(timeout=20.0)
assert box.run("print(1)").passed and not box.run("import os; os.fork()").passed
assert not box.run("open('/tmp/x-of-nobody', 'w')").passed
print(best_protection())
"""
    others: dict = {"user": 65534, "group": 65534, "extra_groups": [], "capture_output": True}
    python = shutil.which("python3", path="/usr/bin") or sys.executable
    if (
        not os.access(python, os.X_OK)
        or subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], **others
        ).returncode
    ):
        pytest.skip("no interpreter that others can read")
    done = subprocess.run([python, "-c", source], text=True, cwd="/", **others)
    assert done.returncode == 0 and done.stdout.strip() in PROTECTIONS, done.stderr
