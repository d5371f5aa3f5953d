"""Text that says things and says them again, so that a retrofit learns what to keep.

In most text little depends on exact words from far back, and a model that forgets them loses next
to nothing there. Here names, numbers and whole sentences come again up to a few hundred tokens
later, which the teacher foresees by looking them up and the folded model has to as well.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence

SENTENCES = 120
"""Sentences of a source text in one text of this kind."""
_FACT, _QUOTE, _MONOTONOUS = 0.3, 0.06, 0.2
_FARTHEST = 40  # sentences between two mentions, at most

_SYLLABLES = "ba bel cor dan den dor el fa fen gar hal il jo ka lan lo mar mi nor ol pe ra ris sa "
_SYLLABLES += "sten ta tor ul va wen yo zel"
_THINGS = "boat cabinet ledger machine parcel lamp painting bicycle tent violin garden".split()
_COLOURS = "red green grey white black brown orange purple".split()

# (said, asked): the answer to what is asked is what was said.
_TEMPLATES = (
    ("The {thing} of {name} has the number {number}.", "Which number has the {thing} of {name}?"),
    ("{name} can be reached at {phone}.", "How can {name} be reached?"),
    ("In the register {name} is entered under {mark}.", "Under what is {name} entered?"),
    ("{name} waits in room {room} at {time}.", "Where and when does {name} wait?"),
    ("{name} paid {number} for the {colour} {thing}.", "What did {name} pay?"),
    ("The {colour} {thing} belongs to {name}.", "Whose is the {colour} {thing}?"),
    ("The word for {thing} is {word} in the speech of {name}.", "What does {name} call a {thing}?"),
    ("{mark}: {name}, {room} {word}", "What is the line of {mark}?"),
)
_LEADS = ("", "", "Again: ", "As said before, ", "To repeat it: ")


def recall_texts(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Makes texts out of others, without end as long as there are any.

    Args:
        texts: prose; its sentences stand between what is to be found again.
        seed: another one draws other facts.

    Yields:
        Texts of about `SENTENCES` sentences of a source each.

    >>> [text] = recall_texts(["It is late. The road was long. " * 20], seed=3)
    >>> print(text[:86])
    It is late. The road was long. It is late. Yomar Joyo paid 408878 for the purple tent.
    """
    rng = random.Random(seed)
    for text in texts:
        sentences = _sentences(text)
        for start in range(0, len(sentences), SENTENCES):
            yield recall_text(sentences[start : start + SENTENCES], rng)


def recall_text(sentences: Sequence[str], rng: random.Random) -> str:
    """One such text: facts between sentences, most of both said again later.

    One text in five goes around and around a few of its sentences, as little else is as easy to
    compress and to get lost in.
    """
    if rng.random() < _MONOTONOUS:
        few = rng.sample(sentences, min(len(sentences), rng.randint(3, 6)))
        sentences = list(itertools.islice(itertools.cycle(few), len(sentences)))
    due: dict[int, list[str]] = {}
    told: list[str] = []
    for index, sentence in enumerate(sentences):
        told.append(sentence)
        told += due.pop(index, [])
        if rng.random() < _FACT:
            said, asked = _fact(rng)
            told.append(said)
            for _ in range(rng.randint(1, 3)):
                due.setdefault(index + _gap(rng), []).append(_mention(said, asked, rng))
        if rng.random() < _QUOTE:
            due.setdefault(index + _gap(rng), []).append(f'As was said: "{sentence}"')
    return " ".join(told)


def _sentences(text: str) -> list[str]:
    """Its sentences of ordinary length."""
    parts = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [part for part in parts if 10 <= len(part) <= 300]


def _gap(rng: random.Random) -> int:
    """Sentences until something is said again: as often 1 to 6 as 6 to 40."""
    return max(1, round(_FARTHEST ** rng.random()))


def _mention(said: str, asked: str, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return f"{asked} {said}"
    return rng.choice(_LEADS) + said


def _fact(rng: random.Random) -> tuple[str, str]:
    values = {
        "name": f"{_word(rng, 2).title()} {_word(rng, 3).title()}",
        "thing": rng.choice(_THINGS), "colour": rng.choice(_COLOURS), "word": _word(rng, 3),
        "number": str(rng.randrange(10 ** rng.randint(2, 7))),
        "phone": f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10_000)}",
        "mark": f"{''.join(rng.choices('ABCDEFGHKLMNPRSTUVWXZ', k=rng.randint(1, 3)))}-"
        f"{rng.randrange(10, 10_000)}",
        "room": str(rng.randrange(1, 500)),
        "time": f"{rng.randrange(24)}:{rng.randrange(60):02d}",
    }  # fmt: skip
    said, asked = rng.choice(_TEMPLATES)
    return said.format(**values), asked.format(**values)


def _word(rng: random.Random, syllables: int) -> str:
    """A word that can be said and that no text has."""
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, syllables)))
