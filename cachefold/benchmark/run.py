"""A whole run: measures the parts one after the other and keeps what is done."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cachefold.attention.dispatch import check_name
from cachefold.benchmark import attention, generate, llama, prefill
from cachefold.benchmark.config import DEFAULT_MODEL, BenchConfig
from cachefold.benchmark.machine import Reader, busy, environment, set_threads
from cachefold.benchmark.models import load_pairs
from cachefold.benchmark.parity import ParityError
from cachefold.benchmark.report import Report
from cachefold.benchmark.synthetic import Shape
from cachefold.zoo import load_base

logger = logging.getLogger(__name__)

Row = dict[str, Any]

BUSY = 0.5
"""Load above which figures are doubtful."""


class Run:
    """A benchmark run.

    Args:
        config: what to measure.
        command: how to get the same figures again.
        json_path: of the report; None = none, as for the other two.
        csv_path: of its rows.
        plot_path: of the picture.
        progress: told one line per row.

    Raises:
        ValueError: a file that can't be written, an unknown backend, too many threads.
    """

    def __init__(
        self,
        config: BenchConfig,
        command: str,
        *,
        json_path: Path | None = None,
        csv_path: Path | None = None,
        plot_path: Path | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_name(config.backend)
        self.config, self.progress = config, progress
        self._pairs: Any = None
        self.report = Report({}, json_path, csv_path, plot_path)
        set_threads(config.threads)
        here = environment()
        if here["load_at_start"] > BUSY:
            logger.warning(
                "load %s: other processes run on this machine, figures will be unsteady",
                here["load_at_start"],
            )
        self.reader = Reader()
        self.bandwidth = self.reader.bandwidth()
        self.report.facts = {
            "command": command,
            "options": asdict(config),
            "seed": config.seed,
            "environment": here,
            "bandwidth": self.bandwidth._asdict(),
        }

    def measure(self) -> bool:
        """Measures every part; one that fails is noted and the next one goes on.

        Returns:
            True when every part that was asked for gave its rows.

        Raises:
            ValueError: options that a part can't take, when it is the first one.
        """
        parts: dict[str, Callable[[], Iterator[Row]]] = {
            "attention": self._attention,
            "generate": self._generate,
            "prefill": self._prefill,
            "llama": self._llama,
        }
        try:
            for part in self.config.parts:
                self._part(part, parts[part])
        finally:  # Ctrl-C too
            self.report.facts["environment"]["load_at_end"] = busy()
            self.report.write()
            self.report.plot()
        return not self.report.failures

    def _part(self, part: str, measure: Callable[[], Iterator[Row]]) -> None:
        try:
            for row in measure():
                self.report.add(row)
                self.progress(self._line(row))
        except ValueError as error:
            if not self.report.rows:
                raise
            self.report.fail(part, str(error))
        except ParityError as error:
            self.report.fail(part, str(error))
        except Exception as error:  # whatever it is, the parts that follow are still wanted
            logger.exception("%s failed", part)
            self.report.fail(part, f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            self.report.fail(part, "interrupted; the rows before it are complete")
            raise

    def _attention(self) -> Iterator[Row]:
        config = self.config
        if config.model == DEFAULT_MODEL:
            shape = Shape(proportional=config.proportional)  # known without loading anything
        else:
            base = load_base(config.model)[0].config
            shape = Shape.of(base, proportional=config.proportional)
        return attention.measure(config, shape, self.reader, self.bandwidth)

    def _generate(self) -> Iterator[Row]:
        return generate.measure(self.config, self._models(), self.bandwidth)

    def _prefill(self) -> Iterator[Row]:
        return prefill.measure(self.config, self._models())

    def _llama(self) -> Iterator[Row]:
        reason = llama.missing(self.config.model)
        if reason is not None:
            self.report.note(f"No llama.cpp anchor: {reason}.")
            return iter(())
        return llama.measure(self.config)

    def _models(self) -> Any:
        if self._pairs is None:
            self._pairs = load_pairs(self.config)
        return self._pairs

    def _line(self, row: Row) -> str:
        """One row for a reader who waits."""
        place = f"{row['kind']} {row['batch']} x {row['context']}"
        if row["kind"] == "llama.cpp":
            return f"{place}: {row['tokens_per_s']:.1f} tok/s, prefill {row['prefill_ms']:.0f} ms"
        place += f" cr {row['cr']:g} {row['backend']} {row['dtype']}"
        if row["kind"] == "attention":
            return (
                f"{place}: {row['speedup_dense']:.2f}x cr 1, {row['speedup_sdpa']:.2f}x SDPA; "
                f"{attention.roofline(row, self.bandwidth)}"
            )
        if row["kind"] == "generate":
            return (
                f"{place}: {row['tokens_per_s']:.1f} tok/s, dense {row['dense_tokens_per_s']:.1f} "
                f"({row['dense_variant']}), {row['speedup_dense']:.2f}x"
            )
        return (
            f"{place}: {row['ms']:.0f} ms, dense {row['dense_ms']:.0f} ms, peak "
            f"{row['peak_bytes'] / 2**20:.0f} MiB, dense {row['dense_peak_bytes'] / 2**20:.0f} MiB"
        )


def to_stderr(line: str) -> None:
    """Prints a line of progress, apart from the report on stdout."""
    print(line, file=sys.stderr, flush=True)
