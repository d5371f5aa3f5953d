"""What README says works: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachefold.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("cachefold ")
]


def test_python_examples_run():
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    names: dict[str, object] = {}
    for example in examples:  # one after the other, as a reader types them
        exec(compile(example, "README.md", "exec"), names)


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    makes = re.findall(r"^make (\w+)$", README, re.MULTILINE)
    assert makes == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in makes)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_these_options(command):
    verb, *rest = shlex.split(command, comments=True)[1:]
    usage = CliRunner().invoke(app, [verb, "--help"])
    assert usage.exit_code == 0
    for option in (word for word in rest if word.startswith("--")):
        assert option in usage.output


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
