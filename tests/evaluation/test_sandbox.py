"""Hostile programs end, say so, and leave nothing behind, under each kind of protection."""

from __future__ import annotations

import doctest
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cachefold.evaluation import sandbox
from cachefold.evaluation.sandbox import PROTECTIONS, Sandbox, best_protection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
ROOT = str(Path(__file__).parents[2])


def _usable():
    found = []
    for protection in PROTECTIONS:
        outcome = Sandbox()._run("", protection)
        mark = pytest.mark.skipif(isinstance(outcome, str), reason=f"{outcome}"[:200])
        found.append(pytest.param(protection, marks=mark))
    return found


@pytest.fixture(params=_usable())
def box(request):
    return Sandbox(timeout=20.0, protection=request.param)


def _lost(box, source):
    outcome = box.run(source)
    assert not outcome.passed and outcome.protection == box.protection
    return outcome


def test_a_good_program_passes_and_its_output_is_kept(box):
    outcome = box.run("import math, collections, re, heapq\nprint('é', math.pi)")
    assert (
        outcome.passed and outcome.reason == "passed" and outcome.output == "é 3.141592653589793\n"
    )


def test_the_strongest_is_taken_and_reported():
    assert Sandbox(timeout=20.0).run("").protection == best_protection()


def test_numbers_of_numpy_work(box):
    source = "import numpy\nassert (numpy.ones((4, 4)) @ numpy.ones(4)).sum() == 16"
    assert box.run(source).passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'wrong sum'", "AssertionError: wrong sum"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os; os._exit(0)", "ended before its last line, exit status 0"),
        ("input()", "EOFError"),
        ("import sys; assert sys.stdin.read() == ''; 1 / 0", "ZeroDivisionError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "E: ?"),
        ("import os; os.abort()", "killed by signal "),
    ],
)
def test_a_program_that_does_not_reach_its_end_has_not_passed(box, source, reason):
    assert _lost(box, source).reason.startswith(reason)


def test_a_program_can_not_claim_to_have_passed(box):
    claim = 'import os\nfor n in range(3, 64):\n  try: os.write(n, b\'{"token": "x"}\\n\')\n'
    _lost(box, claim + "  except OSError: pass\nos._exit(0)")


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(600)"])
def test_an_endless_loop_is_stopped(box, source):
    begin = time.monotonic()
    outcome = _lost(Sandbox(timeout=0.5, protection=box.protection), source)
    assert outcome.reason == "timeout" and time.monotonic() - begin < 15


def test_ignoring_signals_does_not_help(box):
    source = "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    source += "  except (OSError, ValueError): pass\nwhile True: pass"
    assert _lost(Sandbox(timeout=0.5, protection=box.protection), source).reason == "timeout"


def test_cpu_time_ends_too(box):
    source = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert Sandbox(timeout=2.5, protection=box.protection).run(source).output == "(3, 3)\n"


def test_memory_is_bounded(box):
    assert _lost(box, "x = bytearray(4 << 30)").reason == "MemoryError"
    hog = "x = []\nwhile True: x.append(bytearray(10 << 20))"
    assert "MemoryError" in _lost(box, hog).reason


def test_huge_output_is_read_but_not_kept(box):
    small = Sandbox(timeout=60.0, output=1000, protection=box.protection)
    outcome = small.run("for _ in range(2000): print('x' * 9999)\nprint('end')")
    assert outcome.passed and outcome.output == "x" * 1000


def test_endless_output_is_stopped(box):
    short = Sandbox(timeout=0.5, output=1000, protection=box.protection)
    outcome = _lost(short, "import os\nwhile True: os.write(1, b'y' * 65536)")
    assert outcome.reason == "timeout" and outcome.output == "y" * 1000


def test_closing_the_output_does_not_end_the_watch(box):
    short = Sandbox(timeout=0.5, protection=box.protection)
    assert _lost(short, "import os\nos.closerange(0, 64)\nwhile True: pass").reason == "timeout"


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
    _lost(box, start)


def test_no_thread_starts():
    _lost(
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
    ):
        _lost(box, attempt)
    assert os.listdir(tmp_path) == ["kept"] and target.read_text() == "kept"
    assert not (tmp_path.parent / "up").exists()


def test_the_folder_can_be_written_and_goes_away(box):
    source = "import os, tempfile\nopen('a', 'w').write('x')\nprint(os.path.realpath('a'))\n"
    source += "os.mkdir('d'); tempfile.TemporaryFile().write(b'x'); os.remove('a')"
    outcome = box.run(source)
    assert outcome.passed and not Path(outcome.output.strip()).parent.exists()


def test_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        address = server.getsockname()
        _lost(box, f"import socket; socket.create_connection({address!r}, 5)")
        _lost(box, "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
        _lost(box, "import socket; socket.socket(socket.AF_UNIX)")
        url = f"http://127.0.0.1:{address[1]}"
        _lost(box, f"import urllib.request; urllib.request.urlopen({url!r})")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_signals_do_not_reach_others(box):
    other = subprocess.Popen(["sleep", "60"])
    try:
        for target in (os.getpid(), other.pid, -1):
            box.run(f"import os\nos.kill({target}, 9)")
            box.run(f"import os\nos.kill(os.getppid() or {target}, 9)")
        _lost(box, f"import os\nos.killpg({os.getpgid(0)}, 9)")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_environment_is_not_passed_on(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    outcome = box.run("import os; print(os.environ); print(open('/proc/self/environ').read())")
    assert outcome.passed and "s3cret" not in outcome.output


def test_a_hook_is_not_to_be_had_round_by_ctypes():
    for protection in ("seccomp", "audit"):
        _lost(Sandbox(timeout=20.0, protection=protection), "import ctypes; ctypes.CDLL(None)")


RAW = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.{call} == -1 and ctypes.get_errno() == 1, ctypes.get_errno()
"""


@pytest.mark.parametrize(
    "call",
    ["fork()", "setsid()", "kill(os.getppid() or 2, 0)", "socket(2, 1, 0)", "unshare(0x10000000)",
     "ptrace(0, 0, 0, 0)", "mount(b'none', b'/tmp', b'tmpfs', 0, b'')", "chroot(b'.')"],
)  # fmt: skip
def test_the_kernel_itself_refuses(call):
    box = Sandbox(timeout=20.0, protection="namespaces")
    if isinstance(box._run("", "namespaces"), str):
        pytest.skip("no namespaces here")
    outcome = box.run(RAW.format(call=call))
    assert outcome.passed, outcome


def test_nothing_outlives_a_run(box):
    before = _children()
    _lost(Sandbox(timeout=0.5, protection=box.protection), "while True: pass")
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


def test_runs_side_by_side_do_not_mix(box):
    outcomes = {}

    def run(i):
        outcomes[i] = box.run(f"open('f', 'x').write('{i}'); print(open('f').read())").output

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {i: f"{i}\n" for i in range(4)}


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


def test_a_sandbox_that_fails_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_START", "raise SystemExit('broken')")
    with pytest.raises(RuntimeError, match="nothing was run: it printed 'broken"):
        Sandbox(protection="audit").run("print(1)")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="only on Linux.*darwin"):
        Sandbox(protection="audit").run("print(1)")


def test_wrong_limits_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'audit'"):
        Sandbox(protection="audits")
    with pytest.raises(ValueError, match="timeout must be > 0"):
        Sandbox(timeout=0)
    with pytest.raises(ValueError, match="memory must be >="):
        Sandbox(memory=1000)


def test_examples_run():
    assert doctest.testmod(sandbox).failed == 0
