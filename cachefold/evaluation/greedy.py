"""Greedy decoding of a batch; a text that is finished leaves the batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from cachefold.evaluation.footprint import Footprint
from cachefold.evaluation.reading import Reading


@torch.no_grad()
def decode_greedily(
    reading: Reading,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    max_new_tokens: int,
    decode: Callable[[list[int]], str],
    stop: Sequence[str],
    ends: Collection[int],
) -> tuple[list[str], Footprint]:
    """Continues prompts until an end token, a stop string or enough tokens.

    Args:
        reading: at its beginning.
        prompts: token ids, none empty.
        chunk: most tokens of a prompt at once.
        max_new_tokens: most tokens to write.
        decode: ids to text.
        stop: strings that end a text.
        ends: ids that end a text.

    Returns:
        What was written, without what ended it, and the footprint of each text at its end.
    """
    *_, (_, logits) = reading.feed_all(prompts, chunk, keep=1)
    written: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    alive = list(range(len(prompts)))
    total = Footprint()
    for count in range(1, max_new_tokens + 1):
        token = logits[:, -1].argmax(-1)
        going = []
        for place, (row, new) in enumerate(zip(alive, token.tolist(), strict=True)):
            if new not in ends:
                written[row].append(new)
            texts[row], stopped = _cut_at(decode(written[row]), stop)
            if not stopped and new not in ends:
                going.append(place)
        if not going or count == max_new_tokens:
            break
        if len(going) < len(alive):
            before = reading.footprint()
            reading.select(going)
            total += before - reading.footprint()
            token, alive = token[going], [alive[place] for place in going]
        logits = reading.feed(token[:, None], torch.ones_like(token[:, None]).bool(), keep=1)
    return texts, total + reading.footprint()


def _cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one.

    >>> _cut_at("one. two", [".", "two"])
    ('one', True)
    """
    found = [text.index(mark) for mark in stop if mark in text]
    return (text[: min(found)], True) if found else (text, False)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text: those of the generation config and of the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = set(ends if isinstance(ends, (list, tuple)) else [ends])
    return {end for end in found | {getattr(tokenizer, "eos_token_id", None)} if end is not None}
