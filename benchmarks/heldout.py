"""Held-out loss and ratio of an artefact, dense against folded, per domain.

python benchmarks/heldout.py artefacts/smollm2-135m-cr2 --pieces 12 --json FILE
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from cachefold.evaluation.perplexity import heldout_loss
from cachefold.models.hub import load_folded, read_config
from cachefold.zoo import load_base

HELD_OUT = Path(__file__).parent.parent / "data" / "heldout"


def main() -> None:
    """Prints a table; writes JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--pieces", type=int, default=12, help="most pieces of each file")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a piece")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model, tokenizer = load_base(read_config(arguments.artefact)["base"]["id"], dtype=dtype)
    load_folded(arguments.artefact, model)
    rows = []
    print(f"{'file':<12} pieces  dense   folded  increase (se)      cr")
    for file in sorted(HELD_OUT.glob("*.jsonl.gz")):
        (row,) = heldout_loss(
            model, tokenizer, [file], pieces=arguments.pieces, tokens=arguments.tokens
        )
        rows.append(row)
        print(
            f"{row.name:<12} {row.pieces:>6}  {row.dense_loss:.4f}  {row.folded_loss:.4f}  "
            f"{row.increase:+.4f} ({row.increase_error:.4f})  {row.cr:.3f}",
            flush=True,
        )
    mean = sum(row.increase for row in rows) / len(rows)
    least = min(row.cr for row in rows)
    print(f"mean increase {mean:+.4f} nats/token, least cr {least:.3f}, {arguments.dtype}")
    if arguments.json:
        facts = {
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "dtype": arguments.dtype,
            "tokens": arguments.tokens,
            "mean_increase": mean,
            "least_cr": least,
            "files": [asdict(row) | {"increase": row.increase} for row in rows],
        }
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
