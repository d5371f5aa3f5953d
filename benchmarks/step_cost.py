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
from dataclasses import dataclass

import torch
from torch import Tensor

from cachefold.models.lora import add_lora
from cachefold.retrofit.config import DataConfig, RetrofitConfig, TrainConfig
from cachefold.retrofit.data import PackedDataset
from cachefold.retrofit.prepare import prepare
from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.zoo import load_base

RANK = 8


@dataclass(frozen=True)
class Step:
    """One optimisation step of one model."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def seconds(self) -> float:
        """Time of forward, backward and update."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def plain_step(name: str, ids: Tensor) -> Step:
    """Next-token cross entropy with LoRA."""
    model, _ = load_base(name)
    add_lora(model, RANK).train()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, labels=ids, use_cache=False).loss

    return Step(loss, optimizer_of(model))


def retrofit_step(name: str, ids: Tensor, folder: str) -> Step:
    """The loss of the trainer in the middle of its ramp."""
    tokens = ids.shape[1]
    config = RetrofitConfig(
        model=name,
        output_dir=folder,
        data=DataConfig(seq_len=tokens),
        train=TrainConfig(tokens=100 * tokens, lora_rank=RANK),
    )
    model, _ = load_base(name)
    prepare(model, config)
    model.train()
    trainer = RetrofitTrainer(model, args=config, train_dataset=PackedDataset(ids))
    trainer.state.global_step = 30
    return Step(lambda: trainer.compute_loss(model, {"input_ids": ids}), optimizer_of(model))


def report(plain: list[float], retrofit: list[float], tokens: int) -> str:
    """Medians, their ratio and the range of paired ratios; seconds of each step in order."""
    medians = statistics.median(plain), statistics.median(retrofit)
    ratios = sorted(r / p for p, r in zip(plain, retrofit, strict=True))
    return (
        f"plain LoRA step {medians[0]:.2f} s, retrofit step {medians[1]:.2f} s, "
        f"ratio of medians {medians[1] / medians[0]:.2f}, "
        f"paired ratios {ratios[0]:.2f} to {ratios[-1]:.2f}; {len(plain)} repeats, "
        f"1 x {tokens} tokens, {torch.get_num_threads()} threads"
    )


def main() -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    ids = torch.randint(3, 40_000, (1, arguments.seq_len))
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_step(arguments.model, ids)
        retrofit = retrofit_step(arguments.model, ids, folder)
        pairs = [(plain.seconds(), retrofit.seconds()) for _ in range(arguments.repeats + 1)]
    first, second = zip(*pairs[1:], strict=True)  # the first one warms up
    print(report(list(first), list(second), arguments.seq_len))


if __name__ == "__main__":
    main()
