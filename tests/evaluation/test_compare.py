"""Whole comparisons of tiny models: everything in the report, nothing lost, nothing done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cachefold.evaluation import compare as module
from cachefold.evaluation import measure
from cachefold.evaluation import report as report_module
from cachefold.evaluation.batches import Batcher
from cachefold.evaluation.compare import Comparison
from cachefold.evaluation.naming import Naming, parse_methods
from cachefold.evaluation.settings import EvalSettings
from cachefold.evaluation.task import Estimate
from cachefold.models.fold import fold
from cachefold.models.hub import save_folded, update_config
from cachefold.models.lora import add_lora
from cachefold.policies import DMC
from tests.models.tiny import scramble_decisions, tiny_model
from tests.retrofit.tiny import WORDS, make_tokenizer

ENVIRONMENT = {
    "cpu": "a CPU", "gpu": None, "threads": 1, "cachefold": "0", "commit": "abc", "torch": "2",
    "transformers": "5",
}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Mean log-probability of a word after others."""

    name: str = "words"
    metric: str = "logprob"
    higher_is_better: bool = True
    broken: bool = False

    def rows(self, limit: int | None) -> list[dict[str, Any]]:
        return [{"id": str(i), "word": 4 + i} for i in range(5)][:limit]

    def evaluate(self, rows, subject):
        for row in rows:
            if self.broken and row["id"] == "2":
                raise ArithmeticError("it broke")
            [scored] = subject.score([([*range(4, 40)], [row["word"]])])
            yield {"id": row["id"], "logprob": scored.logprob}

    def summarise(self, results):
        return {"logprob": Estimate.of([one["logprob"] for one in results])}


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Words]:
    found = {"words": Words()}
    monkeypatch.setattr(module, "get_task", lambda name: found[name])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    model = tiny_model(eos_token_id=0, bos_token_id=None)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    _save(folder / "artefacts/dmc", folder / "base", seed=1)
    for shift, name in enumerate(("one", "two")):
        text = " ".join(WORDS[(shift + i * i) % len(WORDS)] for i in range(400))
        (folder / f"{name}.txt").write_text(text)
    return folder


def _save(place: Path, base: Path, seed: int) -> None:
    model = add_lora(fold(tiny_model(), DMC(cr=2, delay=4)), 2)
    scramble_decisions(model, seed)
    save_folded(model, place, base={"id": str(base), "revision": "other"})


def comparison(folder: Path, out: Path, words: str, **changes: Any) -> Comparison:
    told = changes.pop("told", [])
    tasks = changes.pop("tasks", ["words"])
    base = str(folder / "base")
    options = {"dtype": "float32", "pieces": 3, "tokens": 32, "context": 64, "model": base}
    methods = parse_methods(words.split(","), Naming(base=base, folders=(folder / "artefacts",)))
    return Comparison(
        EvalSettings(**options | changes), methods, tasks,
        files=[folder / "one.txt", folder / "two.txt"], out=out,
        facts={"command": "x", "environment": ENVIRONMENT}, progress=told.append,
    )  # fmt: skip


def test_every_kind_of_method_in_one_report(folder: Path, tmp_path: Path, tasks) -> None:
    told: list[str] = []
    run = comparison(folder, tmp_path / "out", "tova,dmc,full+int4", told=told, tokens=128)
    assert run.run()
    report = json.loads((tmp_path / "out/eval.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "tova-cr2", "dmc-cr2", "full+int4"]
    assert rows["dense"]["increase"] == 0 and rows["dense"]["cr"] == 1
    for name in ("tova-cr2", "dmc-cr2"):
        row = rows[name]
        assert row["cr"] > 1.2 and row["increase"] != 0 and row["increase_error"] > 0
        assert row["cache_bytes"] < 2 * rows["dense"]["cache_bytes"]  # tables beside tiny heads
        assert row["dense_cache_bytes"] == rows["dense"]["cache_bytes"]
        assert row["tasks"]["words"]["value"] != rows["dense"]["tasks"]["words"]["value"]
    assert rows["dmc-cr2"]["weights"] and rows["full+int4"]["codec"] == "int4"
    assert rows["full+int4"]["cr"] == 1 and rows["full+int4"]["increase"] != 0
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert all(len(row["files"]["one"]["losses"]) == 3 for row in rows.values())
    assert report["settings"]["context"] == 64 and report["environment"]["cpu"] == "a CPU"
    assert report["command"] == "x" and report["seed"] == 0 and report["failures"] == []
    [note] = report["notes"]
    assert note.startswith("dmc-cr2 was made on revision other of the base model")
    assert "words logprob" in " ".join(told) and " on its texts, cache " in " ".join(told)
    assert told[0].startswith("dense: loss ")
    assert (tmp_path / "out/eval.png").exists() and (tmp_path / "out/eval.md").exists()


def test_finished_work_is_not_done_again(folder, tmp_path, tasks, monkeypatch) -> None:
    assert comparison(folder, tmp_path, "tova").run()
    first = json.loads((tmp_path / "eval.json").read_text())
    seen: list[str] = []
    heldout = measure.heldout
    monkeypatch.setattr(measure, "heldout", lambda s, p: seen.append("loss") or heldout(s, p))
    at_context = measure.at_context
    monkeypatch.setattr(measure, "at_context", lambda *a: seen.append("bytes") or at_context(*a))
    evaluate = Words.evaluate
    monkeypatch.setattr(Words, "evaluate", lambda *a: seen.extend(a[1]) or evaluate(*a))
    assert comparison(folder, tmp_path, "tova").run() and seen == []
    again = json.loads((tmp_path / "eval.json").read_text())
    for one in (first, again):
        for row in one["rows"]:
            row["tasks"]["words"].pop("seconds")
    assert again["rows"] == first["rows"]
    assert comparison(folder, tmp_path, "tova,h2o").run()  # a method more
    assert len(seen) == 2 + 1 + 5


def test_a_method_that_fails_costs_no_other(folder, tmp_path, tasks, monkeypatch) -> None:
    applied = module.applied

    def broken(method, model, seed):
        if method.policy == "h2o":
            raise MemoryError("too large")
        return applied(method, model, seed)

    monkeypatch.setattr(module, "applied", broken)
    run = comparison(folder, tmp_path, "h2o,tova")
    assert not run.run()
    rows = {row["name"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert rows["tova-cr2"]["tasks"]["words"]["count"] == 5 and rows["h2o-cr2"]["loss"] is None
    assert run.report["failures"] == [
        {"method": "h2o-cr2", "part": "method", "reason": "MemoryError('too large')"}
    ]
    assert "**h2o-cr2**, method: MemoryError" in (tmp_path / "eval.md").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(module, "get_task", lambda name: tasks[name])
    assert comparison(folder, tmp_path, "h2o,tova").run()  # and goes on once it is mended


def test_a_task_that_fails_costs_no_other(folder, tmp_path, tasks) -> None:
    tasks |= {"first": Words(name="first", broken=True), "second": Words(name="second")}
    run = comparison(folder, tmp_path, "tova", tasks=["first", "second"])
    assert not run.run()
    assert [(f["method"], f["part"]) for f in run.report["failures"]] == [
        ("dense", "first"), ("tova-cr2", "first"),
    ]  # fmt: skip
    assert run.report["failures"][0]["reason"] == "ArithmeticError('it broke')"
    assert all(list(row["tasks"]) == ["second"] for row in run.report["rows"])


def test_a_loss_that_fails_leaves_the_rest(folder, tmp_path, tasks, monkeypatch) -> None:
    monkeypatch.setattr(measure, "heldout", lambda *args: 1 / 0)
    run = comparison(folder, tmp_path, "dense")
    assert not run.run()
    [row] = run.report["rows"]
    assert row["loss"] is None and row["cache_bytes"] and row["tasks"]["words"]["count"] == 5
    assert "| dense |  |" in (tmp_path / "eval.md").read_text()


def test_ctrl_c_keeps_what_is_done(folder, tmp_path, tasks, monkeypatch) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "at_context", stop)
    with pytest.raises(KeyboardInterrupt):
        comparison(folder, tmp_path, "tova").run()
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["rows"][0]["loss"] > 0 and "again to go on" in report["failures"][0]["reason"]
    monkeypatch.undo()
    monkeypatch.setattr(module, "get_task", lambda name: tasks[name])
    assert comparison(folder, tmp_path, "tova").run()


def test_other_settings_are_refused(folder: Path, tmp_path: Path, tasks) -> None:
    assert comparison(folder, tmp_path, "dense").run()
    for changes in ({"limit": 2}, {"pieces": 2}, {"context": 32}, {"seed": 1}):
        with pytest.raises(ValueError, match="results of other settings"):
            comparison(folder, tmp_path, "dense", **changes).run()
    text = (folder / "one.txt").read_text()
    (folder / "one.txt").write_text(text + " w1")
    with pytest.raises(ValueError, match="heldout"):
        comparison(folder, tmp_path, "dense").run()
    (folder / "one.txt").write_text(text)
    assert comparison(folder, tmp_path, "dense").run()


def test_an_artefact_that_was_trained_again_is_no_finished_work(folder, tmp_path, tasks) -> None:
    assert comparison(folder, tmp_path, "dmc").run()
    _save(folder / "artefacts/dmc", folder / "base", seed=5)
    run = comparison(folder, tmp_path, "dmc")
    assert not run.run()
    [failure] = run.report["failures"]
    assert failure["method"] == "dmc-cr2" and "weights" in failure["reason"]


def test_a_base_that_was_trained_again_is_no_finished_work(folder, tmp_path, tasks) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(folder / "base", base)
    assert comparison(folder, out, "tova", model=str(base)).run()
    before = json.loads((out / "eval.json").read_text())
    assert before["revision"].startswith("local:")
    model = tiny_model(eos_token_id=0, bos_token_id=None)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"revision 'local:.* there, 'local:.* now"):
        comparison(folder, out, "tova", model=str(base)).run()
    assert comparison(folder, tmp_path / "new", "tova", model=str(base)).run()
    after = json.loads((tmp_path / "new/eval.json").read_text())
    assert after["rows"][0]["loss"] != before["rows"][0]["loss"]


@pytest.mark.parametrize(("made", "told"), [("local", 0), ("any", 0), ("local:0", 1)])
def test_only_an_artefact_of_other_weights_is_told(folder, tmp_path, tasks, made, told) -> None:
    shutil.copytree(folder / "artefacts/dmc", tmp_path / "artefacts/dmc")
    base = {"id": str(folder / "base"), "revision": made}
    update_config(tmp_path / "artefacts/dmc", {"base": base})
    methods = parse_methods(["dmc"], Naming(base=base["id"], folders=(tmp_path / "artefacts",)))
    run = comparison(folder, tmp_path / "out", "dense", tasks=[])
    run.methods = methods
    assert run.run()
    assert len([note for note in run.report["notes"] if "was made on revision" in note]) == told


def test_without_matplotlib_the_picture_is_missing(folder, tmp_path, tasks, monkeypatch) -> None:
    monkeypatch.setattr(report_module, "missing", lambda: "run `pip install matplotlib`")
    assert comparison(folder, tmp_path, "dense").run()
    assert not (tmp_path / "eval.png").exists()
    assert "No eval.png: run `pip install matplotlib`." in (tmp_path / "eval.md").read_text()


def test_more_than_the_model_reads(folder: Path, tmp_path: Path, tasks, monkeypatch) -> None:
    monkeypatch.setattr(module, "load_base", lambda *args: pytest.fail("loaded"))
    for name in ("context", "tokens"):
        with pytest.raises(ValueError, match=f"--{name} 513 is more than the 512 tokens"):
            comparison(folder, tmp_path, "dense", **{name: 513}).run()


def test_what_was_refused_leaves_the_folder_to_the_next(folder, tmp_path, tasks) -> None:
    out = tmp_path / "out"
    for changes in ({"context": 513}, {"tokens": 500}):  # more than the model reads, than there is
        with pytest.raises(ValueError):
            comparison(folder, out, "dense", **changes).run()
        assert not out.exists()
    assert comparison(folder, out, "dense").run()


def test_a_method_that_was_refused_may_be_mended(folder, tmp_path, tasks) -> None:
    place = tmp_path / "artefacts/dmc"
    shutil.copytree(folder / "artefacts/dmc", place)
    weights = (place / "cachefold.safetensors").read_bytes()
    (place / "cachefold.safetensors").write_bytes(weights[:-8])
    assert not comparison(folder, tmp_path / "out", str(place)).run()
    (place / "cachefold.safetensors").write_bytes(weights)
    assert comparison(folder, tmp_path / "out", str(place)).run()


def test_memory_that_runs_out_in_a_batch_is_no_dead_end(
    folder, tmp_path, tasks, monkeypatch, caplog
) -> None:
    run_batches = Batcher.run

    def tight(self, lengths, spread, work):
        def small(rows):
            if len(rows) > 2:
                raise MemoryError
            return work(rows)

        return run_batches(self, lengths, spread, small)

    monkeypatch.setattr(Batcher, "run", tight)
    run = comparison(folder, tmp_path, "dense", batch_size=3)
    assert not run.run()
    [failure] = run.report["failures"]
    assert failure["reason"] == (
        "MemoryError(); out of memory with 3 texts of up to 31 tokens; --batch-size auto finds "
        "what fits"
    )
    assert not caplog.records  # a traceback would hide the advice
    assert comparison(folder, tmp_path, "dense", batch_size=2).run()
    assert json.loads((tmp_path / "eval.json").read_text())["settings"]["batch_size"] == 2


def test_unknown_tasks_are_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'piqaa'. Did you mean 'piqa'"):
        comparison(folder, tmp_path, "dense", tasks=["piqaa"])
