"""What the audit hook stands for where no namespaces do: it is not to be had round plainly."""

from __future__ import annotations

import os

import pytest

from cachefold.evaluation.sandbox import Sandbox
from tests.evaluation.boxes import ON_LINUX, lost, refusal

pytestmark = ON_LINUX


@pytest.fixture(params=["seccomp", "audit"])
def hooked(request: pytest.FixtureRequest) -> Sandbox:
    if (reason := refusal(request.param)) is not None:
        pytest.skip(reason[:200])
    return Sandbox(timeout=20.0, protection=request.param)


# Deep enough that a path upwards stays inside, seen from here, and leaves, seen from the handle.
RELATIVE = """
import os
os.makedirs("a/" * 9)
open("f", "x").close()
handle = os.open(".", {flags})
os.chdir("a/" * 9)
open("f", "x").close()
os.{call}
"""


@pytest.mark.parametrize(
    ("flags", "call"),
    [
        ("os.O_RDONLY", "open(UP, os.O_CREAT | os.O_WRONLY, dir_fd=handle)"),
        ("os.O_RDONLY", "mkdir(UP, dir_fd=handle)"),
        ("os.O_RDONLY", "rename('f', UP, dst_dir_fd=handle)"),
        ("os.O_RDONLY", "link('f', UP, dst_dir_fd=handle)"),
        ("os.O_PATH | os.O_RDWR", "mkdir(UP, dir_fd=handle)"),
        ("os.O_APPEND", "mkdir(UP, dir_fd=handle)"),
    ],
)
def test_paths_relative_to_a_handle_lead_nowhere(hooked, tmp_path, flags, call):
    up = "../" * 9 + str(tmp_path / "new")[1:]
    outcome = lost(hooked, RELATIVE.format(call=call.replace("UP", repr(up)), flags=flags))
    assert os.listdir(tmp_path) == [] and "refuses" in outcome.reason


LIAR = """
import io
class Liar:
    asked = 0
    def __fspath__(self):
        self.asked += 1
        return {new!r} if self.asked == 1 else "mine"
io.FileIO(Liar(), "w")
"""
FOOL = """
class Fool(str):
    def startswith(self, *_): return False
    def partition(self, _): return "mine", "", ""
open(Fool({new!r}), "w")
"""


@pytest.mark.parametrize("source", [LIAR, FOOL])
def test_paths_that_answer_for_themselves_are_refused(hooked, tmp_path, source):
    assert "refuses" in lost(hooked, source.format(new=str(tmp_path / "new"))).reason
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "writing",
    ["import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = {new!r}",
     "import tkinter; tkinter.Tcl().eval('close [open {new} w]')",
     "import readline; readline.add_history('x'); readline.write_history_file({new!r})",
     "import numpy, safetensors.numpy as s; s.save_file({{'a': numpy.ones(1)}}, {new!r})",
     "import _xxsubinterpreters as s; s.run_string(s.create(), \"open({new!r}, 'w')\")",
     "import sys; sys.modules['cachefold.evaluation.sandbox_hook']._CHANGING.clear()",
     "import os, sys; del sys.modules['posix']; import posix; posix.mknod({new!r})"],
)  # fmt: skip
def test_files_are_not_written_where_python_says_nothing(hooked, tmp_path, writing):
    assert "SyntaxError" not in lost(hooked, writing.format(new=str(tmp_path / "new"))).reason
    assert os.listdir(tmp_path) == []


LOAD = """
import importlib.util as u, shutil, _json
spec = u.spec_from_file_location({name!r}, {file})
u.module_from_spec(spec)
"""


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("x._posixsubprocess", "_json.__file__.replace('_json', '_posixsubprocess')"),
        ("_json", "shutil.copyfile(_json.__file__, '_json.so')"),
    ],
)
def test_compiled_modules_are_known_by_their_file(hooked, name, file):
    assert lost(hooked, LOAD.format(name=name, file=file)).reason.startswith("ImportError")


@pytest.mark.parametrize("use", ["ctypes.CDLL(None)", "ctypes.CFUNCTYPE(None)(1)"])
def test_ctypes_is_not_to_be_had(hooked, use):
    assert lost(hooked, f"import ctypes; {use}").reason.startswith("ImportError")


def test_the_folder_itself_stays(hooked):
    lost(hooked, "import os; root = os.getcwd(); os.remove('program.py'); os.rmdir(root)")


def test_no_links_that_lead_out(hooked):
    lost(hooked, "import os; os.mkdir('d'); os.chdir('d'); os.symlink('..', '../out')")


def test_no_lease_keeps_others_waiting(hooked):
    lost(hooked, f"import fcntl; fcntl.fcntl(open({__file__!r}), fcntl.F_SETLEASE, fcntl.F_RDLCK)")
