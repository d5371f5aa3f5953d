"""All methods on the same text and tasks: measured one after the other, kept, resumed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cachefold.evaluation import measure, report
from cachefold.evaluation.batches import SMALLER_BATCHES, is_memory_error
from cachefold.evaluation.methods import Method, applied
from cachefold.evaluation.rows import Parts, rows
from cachefold.evaluation.runner import TasksFailed, run_tasks
from cachefold.evaluation.settings import EvalSettings
from cachefold.evaluation.store import claim, kept
from cachefold.evaluation.subject import Subject
from cachefold.evaluation.task import get_task
from cachefold.models.hub import file_digest, fits_revision, read_config
from cachefold.writable import check_writable
from cachefold.zoo import base_config, base_revision, load_base

logger = logging.getLogger(__name__)


class Comparison:
    """A comparison of methods.

    Args:
        settings: what is measured.
        methods: the dense model first.
        tasks: names.
        files: held-out text.
        out: folder of the report and of finished work.
        facts: for the report: command, environment.
        progress: told one line per result.

    Raises:
        ValueError: an unknown task, no held-out file, two of one name, or `out` is no folder.
    """

    def __init__(
        self,
        settings: EvalSettings,
        methods: Sequence[Method],
        tasks: Sequence[str],
        *,
        files: Sequence[Path],
        out: Path,
        facts: dict[str, Any],
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        for name in tasks:
            get_task(name)
        check_writable(out)
        self.settings, self.methods, self.tasks = settings, list(methods), list(tasks)
        self.files, self.out, self.progress = list(files), out, progress
        self.parts: dict[str, Parts] = {}
        self.report: dict[str, Any] = facts | {
            "settings": asdict(settings), "seed": settings.seed, "tasks": self.tasks,
            "files": measure.names_of(files),
            "rows": [], "failures": [], "notes": [],
        }  # fmt: skip
        self._draws = report.note_picture(self.report)

    def run(self) -> bool:
        """Measures what isn't measured yet; a part that fails is noted and the next goes on.

        Returns:
            True when nothing failed.

        Raises:
            ValueError: no such model, text that is too short, or results of other settings.
        """
        settings = self.settings
        _check_room(settings)
        model, tokenizer = load_base(settings.model, getattr(torch, settings.dtype))
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        texts = measure.load_texts(
            self.files, tokenizer, pieces=settings.pieces, tokens=settings.tokens,
            context=settings.context,
        )  # fmt: skip
        self._claim(model)  # last, for what is refused has no results
        try:
            for method in self.methods:
                self._method(method, model, tokenizer, texts)
        finally:  # Ctrl-C too
            self.write(picture=True)
        return not self.report["failures"]

    def write(self, *, picture: bool = False) -> list[Path]:
        """Writes the report as far as it is."""
        self.report["rows"] = rows(self.methods, self.parts)
        return report.write(self.report, self.out, picture=picture and self._draws)

    def _claim(self, model: PreTrainedModel) -> None:
        """The folder belongs to these settings, this model and this text."""
        settings = asdict(self.settings)
        del settings["batch_size"]  # memory runs out with one, and the next goes on from there
        facts = settings | {
            "revision": base_revision(self.settings.model, model),
            "cachefold": self.report["environment"]["cachefold"],
            "heldout": {file.name: file_digest(file) for file in self.files},
        }
        claim(self.out / "settings.json", facts, "results")
        self.report["revision"] = facts["revision"]

    def _method(
        self, method: Method, model: PreTrainedModel, tokenizer: Any, texts: measure.Texts
    ) -> None:
        """Measures all of one method, as far as it isn't measured."""
        folder = self.out / "methods" / method.name
        self.parts[method.name] = {"facts": {}, "heldout": {}, "tasks": {}}
        with self._noted(method, "method"):
            facts = self.parts[method.name]["facts"] = method.facts()
            self._check_revision(method)
            with applied(method, model, self.settings.seed):
                claim(folder / "method.json", facts, "results of a method")
                self._text(method, model, tokenizer, texts, folder)
                for name in self.tasks:
                    with self._noted(method, name):
                        self._task(method, name, self._subject(method, model, tokenizer), folder)

    def _text(
        self, method: Method, model: PreTrainedModel, tokenizer: Any, texts: measure.Texts,
        folder: Path,
    ) -> None:  # fmt: skip
        """Loss, bytes and speed on held-out text."""
        parts = self.parts[method.name]
        with self._noted(method, "held-out loss"):
            for name, pieces in texts.pieces.items():
                parts["heldout"][name] = kept(
                    folder / "heldout" / f"{name}.json",
                    functools.partial(
                        measure.heldout, self._subject(method, model, tokenizer), pieces
                    ),
                )
        with self._noted(method, "cache and speed"):
            parts["context"] = kept(
                folder / "context.json",
                functools.partial(measure.at_context, model, texts.contexts, method.codec),
            )
        self._tell(method)

    def _subject(self, method: Method, model: PreTrainedModel, tokenizer: Any) -> Subject:
        return Subject(model, tokenizer, batch_size=self.settings.batch_size, codec=method.codec)

    def _task(self, method: Method, name: str, subject: Subject, folder: Path) -> None:
        try:
            results = run_tasks(
                subject, [get_task(name)], limit=self.settings.limit, store=folder / "tasks"
            )
        except TasksFailed as error:
            raise error.errors[name] from error
        self.parts[method.name]["tasks"][name] = found = results[name]
        error = "" if found["error"] is None else f" ({found['error']:.3f})"
        self.progress(
            f"{method.name}: {name} {found['metric']} {found['value']:.3f}{error}, cr "
            f"{found['cr']:.2f} on its texts, cache {found['bytes_ratio']:.0%} of dense"
        )

    @contextmanager
    def _noted(self, method: Method, part: str) -> Iterator[None]:
        """Notes what fails, so that the rest goes on; writes the report after it."""
        try:
            yield
        except Exception as error:  # whatever it is, what follows is still wanted
            reason = _reason(error)
            if not isinstance(error, ValueError) and not is_memory_error(error):
                logger.exception("%s: %s failed", method.name, part)
            self._fail(method, part, reason)
        except KeyboardInterrupt:
            self._fail(method, part, "interrupted; run the same command again to go on")
            raise
        self.write()

    def _fail(self, method: Method, part: str, reason: str) -> None:
        self.report["failures"].append({"method": method.name, "part": part, "reason": reason})
        self.progress(f"{method.name}: {part} failed: {reason}")

    def _check_revision(self, method: Method) -> None:
        if method.artefact is None:
            return
        made = read_config(method.artefact)["base"].get("revision")
        if not fits_revision(made, self.report["revision"]):
            self.report["notes"].append(
                f"{method.name} was made on revision {made} of the base model; this is "
                f"{self.report['revision']}."
            )

    def _tell(self, method: Method) -> None:
        """Loss and bytes for a reader who waits."""
        found = {row["name"]: row for row in rows(self.methods, self.parts)}[method.name]
        forms = {
            "loss": "loss {:.4f}", "increase": "({:+.4f})", "cr": "cr {:.2f}",
            "cache_bytes": "{:,.0f} bytes", "tokens_per_s": "{:.1f} tok/s",
        }  # fmt: skip
        told = (form.format(found[n]) for n, form in forms.items() if found.get(n) is not None)
        self.progress(f"{method.name}: {' '.join(told)}")


def _reason(error: Exception) -> str:
    """What went wrong and the advice that came with it, in the words of the command line."""
    if isinstance(error, ValueError):
        return str(error)
    told = "; ".join([repr(error), *getattr(error, "__notes__", [])])
    return told.replace(SMALLER_BATCHES, "--batch-size auto")


def _check_room(settings: EvalSettings) -> None:
    """Refuses texts that are longer than the model can read, before its weights are loaded."""
    config = base_config(settings.model).get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    for name in ("tokens", "context"):
        value = getattr(settings, name)
        if most is not None and value > most:
            raise ValueError(
                f"--{name} {value} is more than the {most} tokens {settings.model} reads"
            )
