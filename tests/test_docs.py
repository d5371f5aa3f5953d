"""What README and docs say works: Python runs, commands parse, files are there, figures agree."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import ablations
from cachefold.cli import app
from cachefold.cli.reproduce import asked_ratios
from cachefold.evaluation.report import markdown, read
from cachefold.retrofit.config import load_recipe

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
RESULTS = ROOT / "docs" / "results"


def comments(path: Path) -> str:
    """What stands in lines of comment alone; other lines are empty, so that paragraphs end."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.strip("# ") if line.startswith("#") else "" for line in lines)


def inline(text: str) -> list[str]:
    """Code between backticks, which may go over the end of a line but not of a paragraph."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`((?:[^`\n]|\n(?!\s*\n))+)`", prose)]


def commands() -> list[str]:
    """All command lines that a reader may type."""
    blocks = [block.splitlines() for _, language, block in BLOCKS if not language]
    # Scripts say how to call them; cards of artefacts are pages too.
    blocks += [path.read_text().splitlines() for path in (ROOT / "benchmarks").glob("*.py")]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block]
    cards = [path.read_text(encoding="utf-8") for path in ROOT.glob("artefacts/*/README.md")]
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    recipes = [comments(path) for path in (ROOT / "recipes").rglob("*.yaml")]
    lines += [code for text in (*pages, *cards, *recipes) for code in inline(text)]
    return sorted({line for line in lines if re.match(r"cachefold |python \S+\.py\b", line)})


COMMANDS = [shlex.split(command) for command in commands()]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_python_examples_run(page, example, monkeypatch):
    assert example
    monkeypatch.chdir(ROOT)
    exec(compile(example, page, "exec"), {})


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "cachefold"], ids=" ".join)
def test_commands_parse(words):
    verb, *rest = words[1:]
    parser = typer.main.get_command(app).get_command(None, verb)
    assert parser is not None
    if rest:  # a verb alone is only named
        parser.make_context(verb, rest)


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "python"], ids=" ".join)
def test_scripts_take_these_arguments(words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise InterruptedError

    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(InterruptedError):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_files_in_commands_exist_or_are_made_by_a_run(words):
    recipe = words[1] == "reproduce" and len(words) > 2 and words[2].islower()
    paths = [*words[:2], *words[3:]] if recipe else words
    named = [part for word in paths for part in re.split(r"[,+=\[\]]", word) if "/" in part]
    if recipe:
        named.append(f"recipes/{words[2]}.yaml")
        named += [f"artefacts/{words[2]}"] if "--shipped" in words else []
    missing = [path for path in named if not (ROOT / path).exists()]
    assert all(path.startswith("runs/") for path in missing), missing


REPRODUCED = [w for w in COMMANDS if w[:2] == ["cachefold", "reproduce"] and "--cr" in w]


@pytest.mark.parametrize("words", REPRODUCED, ids=" ".join)
def test_recipes_serve_the_ratios_that_reproduce_is_asked_for(words):
    parser = typer.main.get_command(app).get_command(None, "reproduce")
    asked = parser.make_context("reproduce", words[2:]).params
    recipe = ROOT / "recipes" / f"{asked['name']}.yaml"
    if asked["name"] == "NAME":
        pytest.skip("any recipe")
    asked_ratios(asked["cr"], load_recipe(recipe, asked["overrides"] or []))


def test_no_command_calibrates_what_is_shipped():
    folders = [words[2] for words in COMMANDS if words[:2] == ["cachefold", "calibrate"]]
    assert folders and not [folder for folder in folders if folder.startswith("artefacts/")]


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


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.json")))
def test_a_page_has_the_command_that_made_a_file_of_results(name):
    facts = json.loads((RESULTS / name).read_text())
    if name == "ablations.json":  # many runs of a script, which says its commands itself
        assert "command" not in facts
        return
    made = [facts["command"]] if "command" in facts else [run["command"] for run in facts.values()]
    known = [sorted(words) for words in COMMANDS]
    assert made and all(sorted(shlex.split(command)) in known for command in made)


def table(name: str) -> list[str]:
    """Lines of the table that the command line prints of a report."""
    lines = markdown(read(RESULTS / name)).splitlines()
    return [line for line in lines if line.startswith("|")]


@pytest.mark.parametrize("name", ["methods.json", "ratio-2.05.json"])
def test_tables_of_methods_are_those_of_their_files(name):
    assert "\n".join(table(name)) in (RESULTS / "methods.md").read_text()


def test_the_lab_book_has_the_figures_of_its_files():
    page = (RESULTS / "retrofit.md").read_text()
    assert ablations.table(json.loads((RESULTS / "ablations.json").read_text())) in page
    runs = json.loads((RESULTS / "ratios.json").read_text())
    for cr, one in runs["dial-long"]["measured"].items():
        other = re.escape(f"{runs['dms-dial-long']['measured'][cr]['increase']:+.3f}")
        assert re.search(rf"^\| {cr} \| \S+ \| {cells(one)} \| {other} \|$", page, re.M)
    singles = {name: run["measured"] for name, run in runs.items() if len(run["measured"]) == 1}
    assert len(singles) >= 5
    for name, measured in singles.items():
        assert re.search(rf"^\| {name}\b[^|]*\| {cells(*measured.values())} \|", page, re.M)


def test_what_adapters_gain_without_folding_is_in_the_lab_book():
    page = (RESULTS / "retrofit.md").read_text()
    found = {row["name"]: row["increase"] for row in read(RESULTS / "adapters.json")["rows"]}
    names = [name.removesuffix("-cr1") for name in found if name.endswith("-cr1")]
    assert len(names) == 3
    for name in names:
        adapters, both = found[f"{name}-cr1"], found[f"{name}-cr4"]
        row = f"| {name} | {adapters:+.4f} | {both:+.4f} | {both - adapters:.3f} |"
        assert row in page


def test_the_lab_book_names_the_ablations_that_were_not_run():
    page = " ".join((RESULTS / "retrofit.md").read_text().split())
    [listed] = re.findall(r"Not run: ([^.]*(?:\.\d[^.]*)*)\.", page)
    changes = yaml.safe_load((ROOT / "recipes" / "ablations" / "changes.yaml").read_text())
    done = json.loads((RESULTS / "ablations.json").read_text())
    assert listed.split(", ") == [name for name in changes if name not in done]


@pytest.mark.parametrize(
    ("name", "page"), [("needle.json", "retrofit.md"), ("tasks-arc.json", "methods.md")]
)
def test_scores_in_the_text_are_those_of_their_files(name, page):
    text = " ".join((RESULTS / page).read_text().split())
    for row in read(RESULTS / name)["rows"]:
        [score] = row["tasks"].values()
        value = f"({score['value']:.2f}|{score['value']:.3f})"
        assert re.search(rf"{value} \((standard error )?{score['error']:.3f}\)", text)


def test_the_table_of_readme_has_the_figures_of_the_dial_and_of_cr8():
    """Its dial has three rows at least; a file may have more tables."""
    page = " ".join(README.read_text(encoding="utf-8").split())
    rows = re.findall(r"\| (\d+) \| ([\d.]+ to [\d.]+) \| (\+[\d.]+) \| (\+[\d.]+) \|", page)
    measured = {f"{one['cr']:g}": one for one in heldout("smollm2-135m-dial-wide")}
    assert [cr for cr, *_ in rows][:3] == ["2", "4", "8"]
    for cr, reached, increase, largest in rows:
        one = measured[cr]
        assert largest == f"{max(file['increase'] for file in one['files']):+.3f}"
        assert reached == f"{one['least_cr']:.2f} to {one['most_cr']:.2f}"
        assert increase == f"{one['mean_increase']:+.3f}"
    (single,) = heldout("smollm2-135m-cr8")
    reached = f"reached {single['least_cr']:.2f} to {single['most_cr']:.2f}"
    assert f"better there: {single['mean_increase']:+.3f}, {reached}" in page
    assert single["mean_increase"] < measured["8"]["mean_increase"]


def heldout(artefact: str) -> list[dict[str, Any]]:
    """Loss on held-out text of what is shipped, with 3 pieces of 1,024 tokens of a file."""
    found: list[dict[str, Any]] = json.loads(
        (ROOT / "artefacts" / artefact / "heldout.json").read_text()
    )
    return [one for one in found if (one["pieces"], one["tokens"]) == (3, 1024)]


def cells(run: dict[str, Any]) -> str:
    """Pattern of the increase and of the ratios that were reached."""
    increase = re.escape(f"{run['increase']:+.3f}")
    return rf"{increase} \| {run['least_cr']:.2f} to {run['most_cr']:.2f}"


def test_the_table_of_tasks_has_the_figures_of_its_file():
    """Its rows have shorter names and the tasks alone, which stand last in a report."""
    tasks = len(read(RESULTS / "tasks.json")["tasks"])
    ends = [line.split("| ", line.count("|") - tasks)[-1] for line in table("tasks.json")]
    page = (RESULTS / "methods.md").read_text().splitlines()
    start = next(i for i, line in enumerate(page) if line.endswith(f"| {ends[0]}"))
    for line, end in zip(page[start : start + len(ends)], ends, strict=True):
        assert line.endswith(f"| {end}")
