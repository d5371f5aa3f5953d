"""The report of a comparison: JSON with everything, one Markdown table, one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cachefold.evaluation.plot import draw, missing

MEBI = 1024 * 1024
NAME = "eval"
"""Of the files: eval.json, eval.md, eval.png."""
FORMAT = 1

Row = dict[str, Any]


def write(report: dict[str, Any], folder: Path, *, picture: bool = True) -> list[Path]:
    """Writes all files of a report, each wholly or not at all.

    Args:
        report: `rows`, `failures`, `notes` and what they belong to.
        folder: where to; made if missing.
        picture: draw it too, which takes a second.

    Returns:
        The files; the picture is left out where no row has both bytes and a quality.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    replace(files[0], json.dumps({"format": FORMAT} | report, indent=1, allow_nan=False) + "\n")
    replace(files[1], markdown(report) + "\n")
    drawn = folder / f"{NAME}.png"
    base = Path(report["settings"]["model"]).name
    if picture and draw(report["rows"], drawn, context_of(report), base):
        files.append(drawn)
    return files


def note_picture(report: dict[str, Any]) -> bool:
    """Notes in a report why it gets no picture, in place of what an earlier try noted.

    Returns:
        Whether there is what a picture needs.
    """
    reason, begin = missing(), f"No {NAME}.png: "
    report["notes"] = [note for note in report["notes"] if not note.startswith(begin)]
    if reason is not None:
        report["notes"].append(f"{begin}{reason}.")
    return reason is None


def read(path: Path) -> dict[str, Any]:
    """Reads a report that `write` made.

    Raises:
        ValueError: no such file, or not a report of this version.
    """
    path = path / f"{NAME}.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no report at {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT or not isinstance(report.get("rows"), list):
        raise ValueError(
            f"{path} is no report of `cachefold eval`: format {found!r}; this version reads "
            f"{FORMAT}"
        )
    return report


def context_of(report: dict[str, Any]) -> int:
    """Tokens in the cache where bytes and speed were measured."""
    return report["settings"]["context"]


def markdown(report: dict[str, Any]) -> str:
    """The table, what it belongs to, and what failed."""
    parts = [_about(report)] if "environment" in report else []
    if report["rows"]:
        parts += [_table(report["rows"], context_of(report)), _legend(report)]
    parts += [f"**{f['method']}**, {f['part']}: {f['reason']}" for f in report["failures"]]
    return "\n\n".join([*parts, *report["notes"]])


def headlines(rows: Sequence[Row]) -> list[str]:
    """Names of the tasks that any row has, in the order of the first.

    >>> headlines([{"tasks": {"piqa": {}}}, {"tasks": {"piqa": {}, "boolq": {}}}])
    ['piqa', 'boolq']
    """
    return list(dict.fromkeys(task for row in rows for task in row.get("tasks", {})))


def _about(report: dict[str, Any]) -> str:
    here, settings = report["environment"], report["settings"]
    cpu = f"{here['cpu']}, {here['threads']} threads"
    return (
        f"{settings['model']} in {settings['dtype']}; {here['gpu'] or cpu}; cachefold "
        f"{here['cachefold']} at {here['commit']}, torch {here['torch']}, transformers "
        f"{here['transformers']}; seed {settings['seed']}; `{report['command']}`"
    )


def _legend(report: dict[str, Any]) -> str:
    settings = report["settings"]
    lines = [
        "cr: tokens seen / entries kept on the held-out text. loss: nats/token, mean over "
        f"{', '.join(report['files'])}, at most {settings['pieces']} pieces of "
        f"{settings['tokens']} tokens of each; (in brackets: standard error, of the increase "
        f"that of paired pieces). cache: all bytes allocated after {settings['context']} "
        "held-out tokens, batch 1; tok/s: decoding from there, one method after the other.",
    ]
    metrics = {task: row["tasks"][task] for row in report["rows"] for task in row.get("tasks", {})}
    lines += [f"{task}: {one['metric']}, {one['count']} rows." for task, one in metrics.items()]
    if metrics:
        lines.append("at: tokens seen / entries kept on the texts of the task.")
    return " ".join(lines)


def _table(rows: Sequence[Row], context: int) -> str:
    tasks = headlines(rows)
    header = ["method", "cr", f"cache MiB at {context}", "of dense", "tok/s", "loss", "increase"]
    lines = [[*header, *tasks], ["---", *["---:"] * (len(header) - 1 + len(tasks))]]
    for row in rows:
        dense, held = row.get("dense_cache_bytes"), row.get("cache_bytes")
        cells = [
            row["name"], _number(row.get("cr"), "{:.2f}"),
            _number(held and held / MEBI, "{:.2f}"),
            _number(held and dense and held / dense, "{:.3f}"),
            _number(row.get("tokens_per_s"), "{:.1f}"),
            _number(row.get("loss"), "{:.4f}"),
            _with_error(row.get("increase"), row.get("increase_error"), "{:+.4f}", "{:.4f}"),
        ]  # fmt: skip
        for task in tasks:
            one = row.get("tasks", {}).get(task, {})
            score = _with_error(one.get("value"), one.get("error"), "{:.3f}", "{:.3f}")
            cells.append(score + (f" at {one['cr']:.2f}" if one.get("cr", 1.0) != 1.0 else ""))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, form: str) -> str:
    """A number, or nothing where it wasn't measured."""
    return "" if value is None else form.format(value)


def _with_error(value: float | None, error: float | None, form: str, error_form: str) -> str:
    """Value and standard error.

    >>> _with_error(0.25, 0.0125, "{:+.4f}", "{:.4f}"), _with_error(None, None, "{}", "{}")
    ('+0.2500 (0.0125)', '')
    """
    if value is None:
        return ""
    return form.format(value) + ("" if error is None else f" ({error_form.format(error)})")


def replace(path: Path, text: str) -> None:
    """Writes a file wholly or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
