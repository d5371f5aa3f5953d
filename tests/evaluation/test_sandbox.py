"""Programs end and say how: what passes, what does not, and the limits of time and memory."""

from __future__ import annotations

import doctest
import sys
import threading
import time

import pytest

from cachefold.evaluation import sandbox
from cachefold.evaluation.sandbox import Sandbox, best_protection
from tests.evaluation.boxes import ON_LINUX, lost

pytestmark = ON_LINUX


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
    assert lost(box, source).reason.startswith(reason)


def test_a_program_can_not_claim_to_have_passed(box):
    claim = 'import os\nfor n in range(3, 64):\n  try: os.write(n, b\'{"token": "x"}\\n\')\n'
    lost(box, claim + "  except OSError: pass\nos._exit(0)")


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(600)"])
def test_an_endless_loop_is_stopped(box, source):
    begin = time.monotonic()
    outcome = lost(Sandbox(timeout=0.5, protection=box.protection), source)
    assert outcome.reason == "timeout" and time.monotonic() - begin < 15


def test_ignoring_signals_does_not_help(box):
    source = "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    source += "  except (OSError, ValueError): pass\nwhile True: pass"
    assert lost(Sandbox(timeout=0.5, protection=box.protection), source).reason == "timeout"


def test_cpu_time_ends_too(box):
    source = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert Sandbox(timeout=2.5, protection=box.protection).run(source).output == "(3, 3)\n"


def test_memory_is_bounded(box):
    assert lost(box, "x = bytearray(4 << 30)").reason == "MemoryError"
    hog = "x = []\nwhile True: x.append(bytearray(10 << 20))"
    assert "MemoryError" in lost(box, hog).reason


def test_huge_output_is_read_but_not_kept(box):
    small = Sandbox(timeout=60.0, output=1000, protection=box.protection)
    outcome = small.run("for _ in range(2000): print('x' * 9999)\nprint('end')")
    assert outcome.passed and outcome.output == "x" * 1000


def test_endless_output_is_stopped(box):
    short = Sandbox(timeout=0.5, output=1000, protection=box.protection)
    outcome = lost(short, "import os\nwhile True: os.write(1, b'y' * 65536)")
    assert outcome.reason == "timeout" and outcome.output == "y" * 1000


def test_closing_the_output_does_not_end_the_watch(box):
    short = Sandbox(timeout=0.5, protection=box.protection)
    assert lost(short, "import os\nos.closerange(0, 64)\nwhile True: pass").reason == "timeout"


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
