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
_QUOTE, _MONOTONOUS, _BOTH_WAYS = 0.06, 0.6, 0.4
_FARTHEST = 40  # sentences between two mentions, at most

_SYLLABLES = "ba bel cor dan den dor el fa fen gar hal il jo ka lan lo mar mi nor ol pe ra ris sa "
_SYLLABLES += "sten ta tor ul va wen yo zel"
_WORDS = {
    "thing": "boat cabinet ledger machine parcel lamp painting bicycle tent violin cage house wind "
    "bread river clock door horse paper stone street kitchen winter coat",
    "quality": "red white black brown orange purple old cold warm heavy quiet round wide new clean "
    "slow broken late empty soft",
    "kind": "account room year ticket licence weight price locker register extension total depth",
    "phrase": "So it goes. |Day after day. |And then the next. |Nothing else is new. |",
}
_CHOICES = {
    name: [word.strip() for word in words.split("|" if "|" in words else None)]
    for name, words in _WORDS.items()
}

# (said, the other way around or "", asked): the answer to what is asked is what was said.
_TEMPLATES = (
    ("The {thing} of {name} has the number {number}.", "", "What number has the {thing}?"),
    ("The {kind} of {name} is {number}.", "{number} is the {kind} of {name}.",
     "What is the {kind} of {name}?"),
    ("The {kind} is {number}.", "{number} is the {kind}.", "What is the {kind}?"),
    ("The {quality} {thing} is {mark}.", "{mark} is the {quality} {thing}.",
     "Which one is the {quality} {thing}?"),
    ("{name} can be reached at {phone}.", "{phone} reaches {name}.", "How to reach {name}?"),
    ("In the register {name} is {mark}.", "{mark} is {name}.", "What is {name} there?"),
    ("{name} waits in room {room} at {time}.", "", "Where and when does {name} wait?"),
    ("{name} paid {number} for the {quality} {thing}.", "", "What did {name} pay?"),
    ("The {quality} {thing} belongs to {name}.", "{name} has the {quality} {thing}.",
     "Whose is the {quality} {thing}?"),
    ("The word for {thing} is {word} with {name}.", "{word} is their word for {thing}.",
     "What is the word for {thing}?"),
    ("{mark}: {name}, {room} {word}", "", "What is the line of {mark}?"),
)  # fmt: skip
_LEADS = ("", "", "Again: ", "As said before, ", "To repeat it: ")


def recall_texts(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Makes texts out of others, without end as long as there are any.

    Args:
        texts: prose; its sentences stand between what is to be found again.
        seed: another one draws other facts.

    Yields:
        Texts of about `SENTENCES` sentences of a source each.

    >>> [text] = recall_texts(["It is late. The road was long. " * 20], seed=7)
    >>> text.split(". ")[:3]
    ['It is late', 'Torden Dorul waits in room 286 at 4:18', 'It is late']
    """
    rng = random.Random(seed)
    for text in texts:
        sentences = _sentences(text)
        for start in range(0, len(sentences), SENTENCES):
            yield recall_text(sentences[start : start + SENTENCES], rng)


def recall_text(sentences: Sequence[str], rng: random.Random) -> str:
    """One such text: facts between sentences, most of both said again later.

    Six texts in ten go around and around a few sentences, as little else is as easy to compress
    and to get lost in. Facts stand after every third sentence to every fiftieth.
    """
    rate = 0.4 * 20 ** -rng.random()
    if rng.random() < _MONOTONOUS:
        few = _plain(rng) if rng.random() < 0.5 else rng.sample(sentences, min(len(sentences), 5))
        sentences = list(itertools.islice(itertools.cycle(few), len(sentences)))
    due: dict[int, list[str]] = {}
    told: list[str] = []
    for index, sentence in enumerate(sentences):
        told.append(sentence)
        told += due.pop(index, [])
        if rng.random() < rate:
            said, reverse, asked = _fact(rng)
            told += [said, reverse] if reverse and rng.random() < _BOTH_WAYS else [said]
            for _ in range(rng.randint(2, 4)):
                again = f"{asked} {said}" if rng.random() < 0.5 else rng.choice(_LEADS) + said
                due.setdefault(index + _gap(rng), []).append(again)
        if rng.random() < _QUOTE:
            due.setdefault(index + _gap(rng), []).append(f'As was said: "{sentence}"')
    return " ".join(told)


def _sentences(text: str) -> list[str]:
    """Its sentences of ordinary length."""
    parts = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [part for part in parts if 10 <= len(part) <= 300]


def _plain(rng: random.Random) -> list[str]:
    """A few sentences that say nothing."""
    things, qualities = (rng.sample(_CHOICES[name], 4) for name in ("thing", "quality"))
    said = [f"The {one} is {other}." for one, other in zip(things, qualities, strict=True)]
    return [*said, *filter(None, [rng.choice(_CHOICES["phrase"])])]


def _gap(rng: random.Random) -> int:
    """Sentences until something is said again: as often 1 to 6 as 6 to 40."""
    return max(1, round(_FARTHEST ** rng.random()))


def _fact(rng: random.Random) -> tuple[str, ...]:
    values = {name: rng.choice(words) for name, words in _CHOICES.items()} | {
        "name": f"{_word(rng, 2).title()} {_word(rng, 3).title()}",
        "word": _word(rng, 3),
        "number": str(rng.randrange(10 ** rng.randint(2, 7))),
        "phone": f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10_000)}",
        "mark": f"{''.join(rng.choices('ABCDEFGHKLMNPRSTUVWXZ', k=rng.randint(1, 3)))}-"
        f"{rng.randrange(10, 10_000)}",
        "room": str(rng.randrange(1, 500)),
        "time": f"{rng.randrange(24)}:{rng.randrange(60):02d}",
    }
    return tuple(part.format(**values) for part in rng.choice(_TEMPLATES))


def _word(rng: random.Random, syllables: int) -> str:
    """A word that can be said and that no text has."""
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, syllables)))
