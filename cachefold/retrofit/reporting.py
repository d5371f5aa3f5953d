"""Progress of a retrofit: one plain line per logging step, the same facts as JSON lines, a bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cachefold.retrofit.schedule import RetrofitSchedule

LOG = "log.jsonl"
Facts: TypeAlias = dict[str, Any]
"""What one log line tells, by name."""


class Meter:
    """Means of what the loss saw since the last log line."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, **values: float) -> None:
        """Adds the values of one forward pass."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def drain(self) -> dict[str, float]:
        """Returns the means and starts again."""
        means = {name: total / max(self._count, 1) for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def read_log(folder: Path) -> list[Facts]:
    """Reads the log of a retrofit, one item for each line.

    Raises:
        ValueError: no log in the folder, or a line that can't be read.
    """
    path = folder / LOG
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(
            f"{path} is missing, which a retrofit writes beside its artefact"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; the retrofit did not get to its first line")
    return rows


def log_line(step: int, steps: int, facts: Facts) -> str:
    """Writes the facts of one logging step as a line.

    >>> log_line(12, 900, {"stage": "retrofit", "loss": 0.5, "kd": 0.4, "cr": 1.2, "target": 1.3,
    ...     "alpha": 0.1, "tokens_per_second": 100.4, "eta": 65})
    'step 12/900 retrofit loss 0.5000 kd 0.4000 cr 1.20/1.30 alpha 0.100 100 tokens/s eta 0:01:05'
    """
    return (
        f"step {step}/{steps} {facts['stage']} loss {facts['loss']:.4f} kd {facts['kd']:.4f} "
        f"cr {_ratio(facts)} alpha {facts['alpha']:.3f} "
        f"{facts['tokens_per_second']:.0f} tokens/s eta {_clock(facts['eta'])}"
    )


def _ratio(facts: Facts) -> str:
    return f"{facts['cr']:.2f}/{facts['target']:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Report(TrainerCallback):
    """Prints log lines, appends them to `log.jsonl` and, on a terminal, shows a bar."""

    def __init__(self, output_dir: Path, tokens_per_step: int, schedule: RetrofitSchedule) -> None:
        """Keeps the folder of the log, the tokens of one step and the schedule."""
        self.path = output_dir / LOG
        self.tokens_per_step = tokens_per_step
        self.schedule = schedule
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock; drops log lines of steps that a resumed run does again."""
        # A resumed state brings the intervals of the run before; those of the recipe count.
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)
        self._mark(state)
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= state.global_step]
            self.path.write_text("".join(kept), encoding="utf-8")
        if sys.stdout.isatty():
            self._bar = _make_bar(state)

    def speed(self, state: TrainerState) -> dict[str, float]:
        """`tokens_per_second` since the last log line, and with it `eta`, seconds to the end."""
        elapsed = max(time.monotonic() - self._time, 1e-9)
        rate = (state.global_step - self._last) / elapsed
        left = (state.max_steps - state.global_step) / rate if rate else 0.0
        self._mark(state)
        return {"tokens_per_second": rate * self.tokens_per_step, "eta": left}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line."""
        if not logs or "kd" not in logs or not state.is_world_process_zero:
            return
        stage = self.schedule.stage(state.global_step - 1)
        row: Facts = {"step": state.global_step, "stage": stage}
        # Adding 0 turns a rounded -0.0 into 0.
        row |= {name: round(value, 6) + 0.0 for name, value in logs.items()}
        line = log_line(state.global_step, state.max_steps, row)
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, highlight=False, soft_wrap=True)
            self._bar.update(
                self._bar.task_ids[0], loss=f"{row['loss']:.4f}", cr=_ratio(row),
                eta=_clock(row["eta"]),
            )  # fmt: skip
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the bar away."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back; also called when training fails."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _mark(self, state: TrainerState) -> None:
        self._time, self._last = time.monotonic(), state.global_step


def _step(line: str) -> float:
    """Step of a log line; infinite where a killed run left half a line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _make_bar(state: TrainerState) -> Progress:
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("cr {task.fields[cr]}"),
        TextColumn("eta {task.fields[eta]}"),
    )
    done = state.global_step
    bar.add_task("", total=state.max_steps, completed=done, loss="-", cr="-", eta="-")
    bar.start()
    return bar
