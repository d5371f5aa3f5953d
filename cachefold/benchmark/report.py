"""The report of a run: written after every row, so that nothing is lost when a later one fails."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMPOSED = (
    "cr is imposed: random decisions and entries at the given ratio, so that speed is measured "
    "apart from training."
)
COLUMNS = {
    "attention": (
        "batch", "context", "cr", "dtype", "ms", "dense_ms", "sdpa_ms", "sdpa_dtype",
        "sdpa_packed_ms", "speedup_dense", "speedup_sdpa", "bandwidth_fraction",
    ),
    "generate": (
        "batch", "context", "cr", "dtype", "tokens_per_s", "dense_tokens_per_s", "dense_variant",
        "speedup_dense", "cache_bytes", "dense_cache_bytes", "cache_overhead",
        "bandwidth_fraction",
    ),
    "prefill": (
        "batch", "context", "cr", "dtype", "ms", "dense_ms", "dense_variant", "speedup_dense",
        "peak_bytes", "dense_peak_bytes",
    ),
    "llama.cpp": ("batch", "context", "weights", "tokens_per_s", "prefill_ms"),
}  # fmt: skip
"""What the tables show of a row; JSON and CSV have everything."""


@dataclass
class Report:
    """Rows with what they belong to.

    Attributes:
        facts: command, seeds, options, environment.
        json_path: of the JSON file; None = none, as for the other two.
        csv_path: of the CSV file.
        plot_path: of the picture.

    >>> report = Report({})
    >>> report.add({"kind": "llama.cpp", "batch": 1, "context": 512, "tokens_per_s": 94.123})
    >>> print(report.markdown())
    ### llama.cpp
    <BLANKLINE>
    | batch | context | weights | tokens_per_s | prefill_ms |
    | ---: | ---: | ---: | ---: | ---: |
    | 1 | 512 |  | 94.12 |  |
    """

    facts: dict[str, Any]
    json_path: Path | None = None
    csv_path: Path | None = None
    plot_path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """Parts that ended early: `part` and `reason`."""
    notes: list[str] = field(default_factory=list)
    """What is missing though nothing failed."""

    def __post_init__(self) -> None:
        """Finds out before anything is measured whether the files can be written.

        Raises:
            ValueError: a folder is missing or can't be written to, or matplotlib is missing.
        """
        for option in ("json", "csv", "plot"):
            path = getattr(self, f"{option}_path")
            if path is None:
                continue
            if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise ValueError(
                    f"--{option} {path} can't be written; give a file in a folder that exists "
                    f"(mkdir -p {path.parent})"
                )
        if self.plot_path is not None:
            from cachefold.benchmark.plot import check_matplotlib

            check_matplotlib(self.plot_path)

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row in and writes all files anew."""
        self.rows.append(row)
        self.write()

    def fail(self, part: str, reason: str) -> None:
        """Notes that a part gave no more rows, and why."""
        self.failures.append({"part": part, "reason": reason})
        self.write()

    def note(self, text: str) -> None:
        """Says what the report lacks."""
        self.notes.append(text)
        self.write()

    def write(self) -> None:
        """Writes JSON and CSV, each wholly or not at all."""
        if self.json_path is not None:
            ended = {"failures": self.failures, "notes": self.notes}
            whole = self.facts | {"rows": self.rows} | ended
            _replace(self.json_path, json.dumps(whole, indent=1) + "\n")
        if self.csv_path is not None:
            _replace(self.csv_path, self.csv())

    def plot(self) -> None:
        """Draws the picture, where one was asked for and there is something to draw."""
        if self.plot_path is not None and self.rows:
            from cachefold.benchmark.plot import draw

            draw(self.rows, self.plot_path)

    def csv(self) -> str:
        r"""All rows; the header has the keys of all kinds of rows.

        >>> report = Report({})
        >>> report.add({"kind": "a", "x": 1})
        >>> report.add({"kind": "b", "y": 2})
        >>> report.csv()
        'kind,x,y\na,1,\nb,,2\n'
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def markdown(self) -> str:
        """A table for each kind of rows, with the environment and what is missing."""
        parts = [_about(self.facts)] if self.facts else []
        if any(row.get("cr_imposed") for row in self.rows):
            parts.append(IMPOSED)
        for kind, columns in COLUMNS.items():
            rows = [row for row in self.rows if row["kind"] == kind]
            if rows:
                parts += [f"### {kind}", _table(rows, columns)]
        parts += [f"**{one['part']}** failed: {one['reason']}" for one in self.failures]
        parts += self.notes
        return "\n\n".join(parts)


def _about(facts: dict[str, Any]) -> str:
    """Machine, versions and bandwidth in one line."""
    here, bandwidth = facts["environment"], facts["bandwidth"]
    cpu = f"{here['cpu']}, {here['threads']} threads"
    return (
        f"{here['gpu'] or cpu}; {bandwidth['gbps']:.1f} GB/s ({bandwidth['method']}); "
        f"cachefold {here['cachefold']} at {here['commit']}, torch {here['torch']}, transformers "
        f"{here['transformers']}; load {here['load_at_start']} when it began; `{facts['command']}`"
    )


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    lines = [columns, ("---:",) * len(columns)]
    lines += [tuple(_cell(name, row.get(name)) for name in columns) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(name: str, value: Any) -> str:
    """Four digits of a number, bytes in MiB.

    >>> _cell("cache_bytes", 3 << 20), _cell("ms", 1234.56), _cell("cr", 4.0)
    ('3 MiB', '1235', '4')
    """
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.4g} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
