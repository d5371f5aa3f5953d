"""A tiny random Llama with a word-level tokenizer, saved to a folder; also run as a program."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(60)]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=None,
        eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_workspace(folder: Path) -> None:
    """Writes `model/` and `text.jsonl`."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=60))}) + "\n")


def recipe(folder: Path, output: str = "out", steps: int = 24, **train: object) -> dict:
    return {
        "model": str(folder / "model"),
        "output_dir": str(folder / output),
        "policy": {"name": "dmc", "cr": 2, "delay": 4},
        "data": {"files": [str(folder / "text.jsonl")], "seq_len": 48, "held_out": 4},
        "train": {
            "tokens": steps * 96, "batch_size": 2, "dtype": "float32", "save_every": 5,
            "log_every": 2, "decision_learning_rate": 0.05, **train,
        },
    }  # fmt: skip


def main() -> None:
    """tiny.py RECIPE.json [--resume]"""
    from cachefold.retrofit.config import from_dict
    from cachefold.retrofit.run import run_retrofit

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    run_retrofit(
        from_dict(json.loads(Path(sys.argv[1]).read_text())), resume="--resume" in sys.argv
    )


if __name__ == "__main__":
    main()
