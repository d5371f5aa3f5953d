"""Retrofits that differ from a base recipe in one thing, measured at the same ratios.

python benchmarks/ablations.py                 # all of recipes/ablations/changes.yaml, or go on
python benchmarks/ablations.py base delay-0    # some
python benchmarks/ablations.py --jobs 16       # side by side: one of them hardly occupies a GPU
python benchmarks/ablations.py --jobs 2        # each with one of two cores, which is faster too
python benchmarks/ablations.py --table         # Markdown of what is measured so far

Every run is a dial, so that all are compared at exactly the same ratios, calibrated on training
text. `divergence` is what training itself saw at the end: of the same texts and targets in all runs
that have base's text in base's order, its ramp and its length of sequences. What no option of a
recipe can say is a `variant=NAME` of the variants beside this file. Results are added to a JSON
file; runs that are in it are not done again. One that fails is told on stderr, with exit code 2 in
the end, and the same command tries it again. Side by side each run has a model of its own and its
share of the cores, and `minutes` are those of all at once. The file `variant` in the folder of a
run names the variant that its artefact needs; it is empty where that is none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from cachefold.evaluation.heldout import measure_artefact
from cachefold.evaluation.report import replace
from cachefold.models.hub import read_config
from cachefold.retrofit.checkpoint import check_output, claim_output
from cachefold.retrofit.config import RetrofitConfig, load_recipe
from cachefold.retrofit.reporting import read_log
from cachefold.retrofit.run import FINAL, run_retrofit
from variants import VARIANTS, split

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "ablations"
RESULTS = ROOT / "docs" / "results" / "ablations.json"
RATIOS = (2.0, 4.0, 8.0)
SPLIT = 4.0
MARK = "variant"


def main() -> None:
    """Trains and measures what is asked for."""
    changes: dict[str, list[str]] = yaml.safe_load((RECIPES / "changes.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *changes], help="all without names")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    parser.add_argument("--pieces", type=int, default=3, help="held-out pieces of each file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments.table:
        print(table(results))
        return
    for complaint in odd(results, changes, arguments.pieces):
        print(f"note: {complaint}", file=sys.stderr, flush=True)
    wanted = {n: changes[n] for n in arguments.names or changes if n not in results}
    failed = False
    for name, found in run_all(wanted, arguments.pieces, arguments.jobs):
        if isinstance(found, Exception):
            failed = True
            print(f"error: {name}: {type(found).__name__}: {found}", file=sys.stderr, flush=True)
            continue
        results[name] = found
        replace(RESULTS, json.dumps(results, indent=1) + "\n")
    print(table(results))
    sys.exit(2 if failed else 0)


def odd(results: dict[str, Any], changes: dict[str, list[str]], pieces: int) -> list[str]:
    """What was measured of fewer or more text, or is called something else now.

    >>> odd({"a": {"changes": [], "pieces": 3}}, {"a": ["train.seed=1"]}, 3)
    ['a was measured with the changes [], now there are [train.seed=1]; it is not done again']
    """
    found = []
    for name, one in results.items():
        if one["pieces"] != pieces:
            found.append(f"{name} was measured with --pieces {one['pieces']}, now {pieces}")
        if name in changes and one["changes"] != changes[name]:
            then, now = (", ".join(some) for some in (one["changes"], changes[name]))
            found.append(
                f"{name} was measured with the changes [{then}], now there are [{now}]; it is not "
                "done again"
            )
    return found


def run_all(
    wanted: dict[str, list[str]], pieces: int, jobs: int
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """Runs each in a process of its own, `jobs` at a time.

    Yields:
        Name and result of one that is done, or why there is none: then the others go on.
    """
    cores = max(1, len(os.sched_getaffinity(0)) // jobs)
    with ThreadPoolExecutor(jobs) as threads:
        names = {threads.submit(_apart, n, wanted[n], pieces, cores): n for n in wanted}
        try:
            for done in as_completed(names):
                error = done.exception()
                yield names[done], error if isinstance(error, Exception) else done.result()
        finally:  # Ctrl-C must not start what still waits
            threads.shutdown(cancel_futures=True)


def _apart(name: str, changes: list[str], pieces: int, cores: int) -> dict[str, Any]:
    """`run` in a new process: a pool for each, since one that is killed takes its pool along."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=(cores,)) as pool:
        return pool.submit(run, name, changes, pieces).result()


def _prepare(cores: int) -> None:
    torch.set_num_threads(cores)
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()


def run(name: str, changes: list[str], pieces: int) -> dict[str, Any]:
    """One retrofit and its held-out loss at every ratio, both under its variant if it has one.

    Raises:
        ValueError: the folder of the run has one that was trained under another variant.
    """
    overrides, variant = split(changes)
    output = Path("runs") / "ablations" / name
    config = load_recipe(RECIPES / "base.yaml", [f"output_dir={output}", *overrides])
    found: dict[str, Any] = {"changes": changes}
    claim(config, variant or "")
    with VARIANTS[variant]() if variant else contextlib.nullcontext():
        found |= train_and_measure(config, pieces)
    return found


def claim(config: RetrofitConfig, variant: str) -> None:
    """Makes the folder of a run and marks it with its variant, or checks the mark it has."""
    folder = Path(config.output_dir)
    mark = folder / MARK
    if folder.is_dir() and any(folder.iterdir()):
        known = mark.read_text(encoding="utf-8").strip() if mark.is_file() else ""
        if known != variant:
            raise ValueError(
                f"{folder} was trained under {known or 'no variant'}, not under "
                f"{variant or 'none'}; move or delete it to train again"
            )
    else:
        check_output(config, resume=False)
        # A run starts in an empty folder only, and the mark must be there before: it is resumed.
        claim_output(config)
    mark.write_text(variant, encoding="utf-8")


def train_and_measure(config: RetrofitConfig, pieces: int) -> dict[str, Any]:
    """Increase over dense at every ratio, and minutes of training where it was not done before.

    Raises:
        ValueError: the dial could not be calibrated.
    """
    final = Path(config.output_dir) / FINAL
    found: dict[str, Any] = {"pieces": pieces}
    check_output(config, resume=True)  # a run that is finished already has to be of this recipe
    if not (final / "cachefold.json").is_file():
        start = time.monotonic()
        run_retrofit(config, resume=True)
        found["minutes"] = (time.monotonic() - start) / 60
    if "dial" not in read_config(final):
        raise ValueError(f"the dial of {final} is not calibrated, so that ratios would be off")
    if config.train.kd_weight:
        found["divergence"] = divergence(final)
    for cr in RATIOS:
        facts = measure_artefact(final, cr=cr, pieces=pieces, progress=print)
        found["machine"] = facts["machine"]
        found[f"{cr:g}"] = {
            "increase": facts["mean_increase"],
            "files": {file["name"]: [file["increase"], file["cr"]] for file in facts["files"]},
        }
    return found


def divergence(artefact: Path) -> dict[str, float]:
    """What distillation saw in the last quarter of the steps, with relaxed decisions.

    Args:
        artefact: its folder, which has the log of its retrofit.

    Returns:
        Mean divergence from the original, nats/token: `low` of targets up to SPLIT, `high` of those
        above. KL(original || folded) unless the run was trained on another one.
    """
    steps = read_log(artefact)
    steps = steps[-max(len(steps) // 4, 1) :]
    parts = {
        "low": [step["kd"] for step in steps if step["target"] <= SPLIT],
        "high": [step["kd"] for step in steps if step["target"] > SPLIT],
    }
    return {name: statistics.fmean(part) for name, part in parts.items() if part}


def table(results: dict[str, Any]) -> str:
    """Markdown: increase over dense at each ratio, best at the middle one first; divergences."""
    lines = [
        f"| run | machine | {' | '.join(f'cr {cr:g}' for cr in RATIOS)} | to {SPLIT:g} | above |",
        f"| --- | --- |{' ---: |' * (len(RATIOS) + 2)}",
    ]
    for name in sorted(results, key=lambda name: results[name][f"{RATIOS[1]:g}"]["increase"]):
        found = results[name]
        cells = [f"{found[f'{cr:g}']['increase']:+.4f}" for cr in RATIOS]
        parts = [found.get("divergence", {}).get(part) for part in ("low", "high")]
        cells += ["" if part is None else f"{part:.3f}" for part in parts]
        machine = "CPU" if "threads" in found["machine"] else found["machine"]
        lines.append(f"| {name} | {machine} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
