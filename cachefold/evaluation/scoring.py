"""Loss of the last tokens of texts that go through a cache together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from cachefold.evaluation.reading import Reading

Losses: TypeAlias = tuple[Tensor, Tensor]
"""(N,) float32 nats of N tokens, and (N,) bool, whether each is the likeliest; on the CPU."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens to feed, and what may come at their end."""

    fed: tuple[int, ...]
    """Token ids."""
    targets: tuple[tuple[int, ...], ...]
    """Alternatives; each ends one token after the last that is fed."""


@torch.no_grad()
def read_losses(reading: Reading, texts: Sequence[Text], chunk: int) -> list[list[Losses]]:
    """Feeds texts and takes the losses of their targets.

    Args:
        reading: at its beginning.
        texts: B texts.
        chunk: most tokens of a text at once.

    Returns:
        For each text one result for each target.
    """
    keep = max(len(target) for text in texts for target in text.targets)
    width = max(len(text.fed) for text in texts)
    pieces: list[list[list[Losses]]] = [[[] for _ in text.targets] for text in texts]
    for first, logits in reading.feed_all([text.fed for text in texts], chunk, keep):
        for text, row, found in zip(texts, logits, pieces, strict=True):
            for target, parts in zip(text.targets, found, strict=True):
                # The logits of column c are about item c + len(target) - width of the target.
                item = first + len(target) - width
                wanted = target[max(item, 0) : max(item + len(row), 0)]
                if wanted:
                    parts.append(token_losses(row[max(-item, 0) :], wanted))
    return [[_join(parts) for parts in found] for found in pieces]


def _join(parts: list[Losses]) -> Losses:
    nats, greedy = zip(*parts, strict=True)
    return torch.cat(nats), torch.cat(greedy)


def token_losses(logits: Tensor, target: Sequence[int]) -> Losses:
    """Loss of each token, and whether it is the likeliest.

    Args:
        logits: (N, V) of any float type.
        target: N token ids.

    >>> nats, greedy = token_losses(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), [1, 1])
    >>> [round(x, 3) for x in nats.tolist()], greedy.tolist()
    ([0.693, 0.0], [False, True])
    """
    wide = logits.float()
    labels = torch.tensor(target, device=logits.device)
    nats = F.cross_entropy(wide, labels, reduction="none")
    return nats.cpu(), (wide.argmax(-1) == labels).cpu()
