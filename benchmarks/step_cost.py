"""Cost of a retrofit step against a plain LoRA step of the same model and batch.

    python benchmarks/step_cost.py --repeats 7

Both run interleaved in this process: forward, loss, backward, AdamW. The plain step is next-token
cross entropy as transformers computes it, same LoRA, same dtype. The retrofit step is
`RetrofitTrainer.compute_loss` in the middle of its ramp, the teacher's forward included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from cachefold.models.hub import add_lora
from cachefold.retrofit.config import DataConfig, RetrofitConfig, TrainConfig
from cachefold.retrofit.data import PackedDataset
from cachefold.retrofit.run import prepare
from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.zoo import load_base


def timed(step: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one optimisation step."""
    start = time.perf_counter()
    step().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    """Prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    ids = torch.randint(3, 40_000, (1, arguments.seq_len))
    plain, _ = load_base(arguments.model)
    add_lora(plain, 8).train()

    with tempfile.TemporaryDirectory() as folder:
        config = RetrofitConfig(
            model=arguments.model,
            output_dir=folder,
            data=DataConfig(seq_len=arguments.seq_len),
            train=TrainConfig(tokens=100 * arguments.seq_len),
        )
        model, _ = load_base(arguments.model)
        prepare(model, config)
        model.train()
        trainer = RetrofitTrainer(model, config, PackedDataset(ids))
        trainer.state.global_step = 30

        def plain_step() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return plain(ids, labels=ids, use_cache=False).loss

        def retrofit_step() -> torch.Tensor:
            return trainer.compute_loss(model, {"input_ids": ids})

        optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
            for m in (plain, model)
        ]
        times: list[list[float]] = [[], []]
        for _ in range(arguments.repeats + 1):
            for i, step in enumerate((plain_step, retrofit_step)):
                times[i].append(timed(step, optimizers[i]))
        trainer.report.close()
    plain_time, retrofit_time = (statistics.median(t[1:]) for t in times)
    ratios = sorted(r / p for p, r in zip(times[0][1:], times[1][1:], strict=True))
    print(
        f"plain LoRA step {plain_time:.2f} s, retrofit step {retrofit_time:.2f} s, "
        f"ratio of medians {retrofit_time / plain_time:.2f}, "
        f"paired ratios {ratios[0]:.2f} to {ratios[-1]:.2f}; {arguments.repeats} repeats, "
        f"1 x {arguments.seq_len} tokens, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
