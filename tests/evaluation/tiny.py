"""A tokenizer of characters for the tiny models, and texts for it."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_CHARACTERS = string.ascii_lowercase + "ABCDQ" + string.digits + " .,?:\n'"


def tiny_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """One token per character; fewer than the 64 of a tiny model."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    assert len(vocabulary) <= 64
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    options = names | {"unk_token": "<unk>", "clean_up_tokenization_spaces": False} | changes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, 260 in all: it tells any two texts apart."""
    tokens = (*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def rows_of(count: int) -> list[dict[str, Any]]:
    """Questions with two answers of different lengths."""
    return [
        {
            "id": f"row/{index}", "query": f"what is {index} and why {'so ' * (index % 5)}?",
            "choices": [f"it is {'b' * (index % 3 + 1)}", "a thing that nobody knows"],
            "gold": index % 2,
        }
        for index in range(count)
    ]  # fmt: skip
