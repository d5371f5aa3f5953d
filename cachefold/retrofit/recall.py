"""Text that says things and says them again, so that a retrofit learns what to keep.

In most text little depends on exact words from far back, and a model that forgets them loses next
to nothing there. Here names, numbers and whole sentences come again up to a thousand tokens
later, which the teacher foresees by looking them up and the folded model has to as well.

Nothing but the text itself gives away what is to come: any subject may have a value of any sort, a
number, a word, a name or a description, and many texts hold one or two facts, so that no earlier
answer shows how answers look.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence

SHORTEST, PER_TOKEN = 1_000, 3
"""Characters of a text of this kind at least, before what is put between, and at most for each
token of a training sequence: what is cut off can't be looked up."""
MOST_FACTS = 24
_QUOTE, _MONOTONOUS, _BOTH_WAYS, _OWN_WORDS = 0.05, 0.6, 0.4, 0.25

_SYLLABLES = "ba bel cor dan den dor el fa fen gar hal il jo ka lan lo mar mi nor ol pe ra ris sa "
_SYLLABLES += "sten ta tor ul va wen yo zel"
_WORDS = {
    "thing": "boat cabinet ledger machine parcel lamp painting bicycle tent violin cage house wind "
    "bread river clock door horse paper stone street kitchen winter coat",
    "quality": "red white black brown orange purple old cold warm heavy quiet round wide new clean "
    "slow broken late empty soft",
    "kind": "account room year ticket licence weight price locker register extension total depth "
    "code signal label gate station dosage prize answer winner reason colour address owner order",
    "phrase": "So it goes. |Day after day. |And then the next. |Nothing else is new. |",
}
_CHOICES = {
    name: [word.strip() for word in words.split("|" if "|" in words else None)]
    for name, words in _WORDS.items()
}

_SUBJECTS = ("{kind}", "{kind}", "{kind} of {name}", "{quality} {thing}", "{thing} of {name}")
_VALUES = (
    "{number}", "{number}", "{number}", "{word}", "{word}", "{name}", "{mark}", "{time}",
    "{quality}", "the {quality} {thing}", "a {thing}", "in the {thing}",
)  # fmt: skip
# (said, the other way around or "", asked): the answer to what is asked is what was said.
_IS = ("The {subject} is {value}.", "{value} is the {subject}.", "What is the {subject}?")
_OTHERS = (
    ("The {thing} of {name} has the number {number}.", "", "What number has the {thing}?"),
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


def recall_texts(texts: Iterable[str], seed: int, seq_len: int = 1024) -> Iterator[str]:
    """Makes texts out of others.

    Args:
        texts: prose; its sentences stand between what is to be found again.
        seed: another one draws other facts.
        seq_len: tokens of a training sequence.

    Yields:
        Texts of `SHORTEST` to `PER_TOKEN * seq_len` characters of a source, or what it has, and
        facts.

    >>> [text] = recall_texts(["It is late. The road was long. " * 20], seed=9)
    >>> text[22:63]
    'The heavy boat is 2. 2 is the heavy boat.'
    """
    rng, longest = random.Random(seed), max(SHORTEST, PER_TOKEN * seq_len)
    for text in texts:
        sentences = _sentences(text)
        while sentences:
            taken = _up_to(sentences, _log_uniform(rng, SHORTEST, longest))
            sentences = sentences[len(taken) :]
            yield recall_text(taken, rng, longest)


def recall_text(sentences: Sequence[str], rng: random.Random, longest: int = 3_000) -> str:
    """One such text: facts between sentences, all of them said again later.

    Six texts in ten go around and around a few sentences instead, as little else is as easy to
    compress and to get lost in: for as many characters as come out, up to `longest`. There are 1
    to `MOST_FACTS` facts, not more than one for three sentences, as often few as many.
    """
    if rng.random() < _MONOTONOUS:
        few = _plain(rng) if rng.random() < 0.5 else rng.sample(sentences, min(len(sentences), 5))
        sentences = _up_to(itertools.cycle(few), _log_uniform(rng, SHORTEST, longest))
    last = len(sentences) - 1
    due: dict[int, list[str]] = {}
    taken: set[str] = set()
    for _ in range(_log_uniform(rng, 1, min(MOST_FACTS, 1 + last // 3))):
        said, reverse, asked = _fact(rng, taken)
        place = rng.randint(0, last)
        first = [said, reverse] if reverse and rng.random() < _BOTH_WAYS else [said]
        due.setdefault(place, []).extend(first)
        for _ in range(rng.randint(1, 3)):
            again = f"{asked} {said}" if rng.random() < 0.6 else rng.choice(_LEADS) + said
            due.setdefault(_later(rng, place, last), []).append(again)
    told: list[str] = []
    for place, sentence in enumerate(sentences):
        told += [sentence, *due.pop(place, ())]
        if rng.random() < _QUOTE:
            due.setdefault(_later(rng, place, last), []).append(f'As was said: "{sentence}"')
    return " ".join(told + list(itertools.chain.from_iterable(due.values())))


def _sentences(text: str) -> list[str]:
    """Its sentences of ordinary length."""
    parts = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [part for part in parts if 10 <= len(part) <= 300]


def _up_to(sentences: Iterable[str], characters: int) -> list[str]:
    """The first of them, as many as it takes to have so many characters."""
    taken, left = [], characters
    for sentence in sentences:
        if left <= 0:
            break
        taken.append(sentence)
        left -= len(sentence)
    return taken


def _plain(rng: random.Random) -> list[str]:
    """A few sentences that say nothing."""
    things, qualities = (rng.sample(_CHOICES[name], 4) for name in ("thing", "quality"))
    said = [f"The {one} is {other}." for one, other in zip(things, qualities, strict=True)]
    return [*said, *filter(None, [rng.choice(_CHOICES["phrase"])])]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    """As often from low to x as from x to high, when x is the geometric mean of both."""
    return round(low * (high / low) ** rng.random())


def _later(rng: random.Random, place: int, last: int) -> int:
    """Where something is said again: half of the time anywhere after, half of it rather near."""
    most = max(last - place, 1)
    gap = rng.randint(1, most) if rng.random() < 0.5 else _log_uniform(rng, 1, most)
    return min(place + gap, last + 1)


def _fact(rng: random.Random, taken: set[str]) -> tuple[str, ...]:
    """Said, the other way around, asked; of a subject that is not `taken`, which it then is."""
    while True:
        fact = _some_fact(rng)
        if fact[2] not in taken:
            taken.add(fact[2])
            return fact


def _some_fact(rng: random.Random) -> tuple[str, ...]:
    if rng.random() < _OWN_WORDS:
        names = _names(rng)
        return tuple(part.format(**names) for part in rng.choice(_OTHERS))
    subject = rng.choice(_SUBJECTS).format(**_names(rng))
    value = rng.choice(_VALUES).format(**_names(rng))
    while set(subject.split()) & set(value.split()) - {"the"}:  # "The red stone is red"
        value = rng.choice(_VALUES).format(**_names(rng))
    said, reverse, asked = (part.format(subject=subject, value=value) for part in _IS)
    return said, reverse[0].upper() + reverse[1:], asked


def _names(rng: random.Random) -> dict[str, str]:
    """A word or number for each name in the templates."""
    return {name: rng.choice(words) for name, words in _CHOICES.items()} | {
        "name": f"{_word(rng, 2).title()} {_word(rng, 3).title()}",
        "word": _word(rng, 3),
        "number": str(rng.randrange(10 ** rng.randint(2, 7))),
        "phone": f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10_000)}",
        "mark": f"{''.join(rng.choices('ABCDEFGHKLMNPRSTUVWXZ', k=rng.randint(1, 3)))}-"
        f"{rng.randrange(10, 10_000)}",
        "room": str(rng.randrange(1, 500)),
        "time": f"{rng.randrange(24)}:{rng.randrange(60):02d}",
    }


def _word(rng: random.Random, syllables: int) -> str:
    """A word that can be said and that no text has."""
    return "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(2, syllables)))
