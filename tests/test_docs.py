"""What README and docs say works: Python runs, commands exist, linked files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cachefold.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page, language, block)
    for page in PAGES
    for language, block in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]
PYTHON = [(page, block) for page, language, block in BLOCKS if language == "python"]
# Those of README one after the other, as a reader types them; one in docs stands alone.
EXAMPLES = [
    (README.name, "\n".join(block for page, block in PYTHON if page == README)),
    *((page.name, block) for page, block in PYTHON if page != README),
]
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for _, language, block in BLOCKS
        if not language
        for line in block.splitlines()
        if line.startswith("cachefold ")
    }
)


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_python_examples_run(page, example, monkeypatch):
    assert example
    monkeypatch.chdir(ROOT)
    exec(compile(example, page, "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_these_options(command):
    verb, *rest = shlex.split(command)[1:]
    usage = CliRunner().invoke(app, [verb, "--help"])
    assert usage.exit_code == 0
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert option in usage.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links or page != README
    assert all((page.parent / link).exists() for link in links)


def test_there_are_exactly_two_commands_for_a_fresh_machine():
    makes = re.findall(r"^make (\w+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert makes == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in makefile for name in makes)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
