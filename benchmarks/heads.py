"""What each head of a folded model would give if it kept every token, on text made for recall.

python benchmarks/heads.py artefacts/smollm2-135m-dial-recall --cr 4

Heads whose loss falls most for the entries they take are for `train.spare` of a recipe. The loss is
KL(original || folded) at the tokens where the folded model loses more than `LOST` nats: those that
have to be looked up far back. One line for each head that merges a little: its ratio now, and how
much that falls when it merges nothing. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from cachefold.core.dial import NEVER
from cachefold.models.dial import turn_dial
from cachefold.models.families import attention_layers
from cachefold.models.fold import FoldRun, folded_layers
from cachefold.models.hub import load_folded, read_config
from cachefold.policies.decisions import LinearDecision
from cachefold.retrofit.recall import recall_texts
from cachefold.text import pack_rows, read_file
from cachefold.zoo import load_base

TOKENS = 1024
SEED = 1_000  # other facts than those of a training run
LOST = 0.25
"""Nats of KL from which a token counts."""
LEAST, MOST = 1.1, 8.0
"""Ratios of heads to look at: others merge too little, or would take too many entries."""


def main() -> None:
    """Measures every head alone, then the best ones together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--cr", type=float, default=4.0, help="of the dial")
    parser.add_argument("--texts", type=int, default=2, help=f"of {TOKENS} tokens")
    parser.add_argument("--together", type=int, default=8, help="heads to add up at the end")
    parser.add_argument("--data", type=Path, default=Path("data/train/mix.jsonl.gz"))
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv])}
    try:
        measure_heads(
            Probe(arguments.artefact, arguments.cr, arguments.data, arguments.texts),
            arguments.together,
            report,
        )
    except ValueError as error:
        parser.error(str(error))
    finally:  # Ctrl-C too: heads that are measured took minutes
        if arguments.json and "rows" in report:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure_heads(probe: Probe, together: int, report: dict[str, Any]) -> None:
    """Fills `report`, head by head.

    Raises:
        ValueError: no token is lost, so that there is nothing to gain.
    """
    parts, ratios = probe.measure()
    lost = parts > LOST
    if not bool(lost.any()):
        raise ValueError(
            f"no token loses more than {LOST} nats: take more --texts or a larger --cr"
        )
    loss = float(parts[lost].mean())
    print(
        f"KL {parts.mean():.4f} in all, {loss:.4f} at {int(lost.sum())} lost tokens, at cr "
        f"{probe.ratio(ratios):.2f}", flush=True,
    )  # fmt: skip
    rows = report["rows"] = []
    report["kl_of_lost"] = loss
    for (layer, head), ratio in ratios.items():
        if not LEAST <= ratio <= MOST:
            continue
        gain = loss - float(probe.without([(layer, head)])[0][lost].mean())
        rows.append({"layer": layer, "head": head, "ratio": ratio, "gain": gain})
        print(f"layer {layer} head {head}: cr {ratio:.1f}, {gain:+.4f}", flush=True)
    rows.sort(key=lambda row: -row["gain"] / (1 - 1 / row["ratio"]))
    print("\nbest for what they take, together:")
    for count in range(1, min(together, len(rows)) + 1):
        heads = [(row["layer"], row["head"]) for row in rows[:count]]
        found, after = probe.without(heads)
        kl = {"all": float(found.mean()), "lost": float(found[lost].mean())}
        rows[count - 1]["together"] = {**kl, "cr": probe.ratio(after)}
        print(
            f"{heads[-1]}: KL {kl['all']:.4f} in all, {kl['lost']:.4f} at lost tokens, cr "
            f"{probe.ratio(after):.2f}", flush=True,
        )  # fmt: skip


class Probe:
    """A folded model, texts, and what the original says of them."""

    def __init__(self, artefact: Path, cr: float, data: Path, count: int) -> None:
        base = str(read_config(artefact)["base"]["id"])
        self.model, tokenizer = load_base(base, torch.bfloat16)
        self.texts = _texts(data, tokenizer, count)
        with torch.no_grad():
            self.wanted = [self.model(text).logits[0].log_softmax(-1) for text in self.texts]
        load_folded(artefact, self.model)
        turn_dial(self.model, read_config(artefact).get("dial", {}), cr=cr)
        layers = attention_layers(self.model)
        self.decisions = {i: layers[i].decision for i in folded_layers(self.model)}
        if not all(isinstance(one, LinearDecision) for one in self.decisions.values()):
            raise ValueError(
                f"the heads of {artefact} do not decide by a projection, as train.spare needs"
            )

    @torch.no_grad()
    def measure(self) -> tuple[Tensor, dict[tuple[int, int], float]]:
        """KL of every token in nats, and tokens / entries of every (layer, head)."""
        parts: list[Tensor] = []
        alpha: list[Tensor] = []
        for text, wanted in zip(self.texts, self.wanted, strict=True):
            recorder: dict[int, Any] = {}
            run = FoldRun(recorder=recorder)
            logits = self.model(text, use_cache=False, fold_run=run).logits[0]
            parts.append(_divergence(wanted, logits))
            alpha.append(torch.stack([recorder[i].alpha[0].mean(-1) for i in self.decisions]))
        kept = 1 - torch.stack(alpha).mean(0)
        heads = {
            (layer, head): 1 / float(share)
            for layer, shares in zip(self.decisions, kept, strict=True)
            for head, share in enumerate(shares)
        }
        return torch.cat(parts), heads

    def without(self, heads: list[tuple[int, int]]) -> tuple[Tensor, dict[tuple[int, int], float]]:
        """What `measure` gives when these heads merge nothing."""
        before = {layer: copy.deepcopy(self.decisions[layer].state_dict()) for layer, _ in heads}
        for layer, head in heads:
            self.decisions[layer].weight.data[head] = 0.0
            self.decisions[layer].bias.data[head] = NEVER
        found = self.measure()
        for layer, state in before.items():
            self.decisions[layer].load_state_dict(state)
        return found

    @staticmethod
    def ratio(ratios: dict[tuple[int, int], float]) -> float:
        """Of all heads together."""
        return len(ratios) / sum(1 / ratio for ratio in ratios.values())


def _texts(data: Path, tokenizer: Any, count: int) -> list[Tensor]:
    """Texts of `TOKENS` tokens made for recall."""
    prose = (str(row["text"]) for _, row in read_file(str(data)) if "text" in row)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for text in recall_texts(prose, SEED, TOKENS):
            made.append(len(text))
            if sum(made) > 6 * TOKENS * count:  # characters: enough, and not all of the file
                return
            yield "recall", {"text": text}

    made: list[int] = []
    return list(pack_rows(rows(), tokenizer, TOKENS, "text")[:count].split(1))


def _divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL(wanted || softmax of logits) of every token, in nats."""
    parts = [
        (p.float().exp() * (p.float() - q.float().log_softmax(-1))).sum(-1)
        for p, q in zip(wanted.split(128), logits.split(128), strict=True)
    ]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
