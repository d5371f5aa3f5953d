"""Prompts with something to find in them, of any length in tokens, the same for the same seed.

They follow the ideas of the public needle-in-a-haystack and RULER tests (Hsieh et al. 2024,
arXiv:2404.06654) but are not those tests: don't compare figures.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cachefold.core.names import closest
from cachefold.evaluation.task import data_file
from cachefold.text import read_file

_PROSE = "heldout/moby_dick.jsonl.gz"
_BEGINNING = "Call me Ishmael."
_LONGEST = 240  # characters, so that a prompt comes close to its length

_ADJECTIVES = (
    "amber", "ancient", "bright", "broken", "calm", "clever", "copper", "distant", "dusty",
    "early", "empty", "faint", "frozen", "gentle", "golden", "hollow", "humble", "icy", "inner",
    "ivory", "jolly", "keen", "kind", "lively", "long", "lunar", "marble", "misty", "narrow",
    "noble", "olive", "patient", "plain", "proud", "quiet", "rapid", "rusty", "scarlet", "silent",
    "silver", "slender", "smooth", "solar", "spare", "steady", "tall", "tender", "tidy", "upper",
    "urban", "velvet", "violet", "vivid", "warm", "wide", "wild", "wooden", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "apple", "arrow", "basket", "bell", "blanket", "branch", "bridge", "bucket",
    "button", "cactus", "candle", "castle", "cloud", "coin", "cradle", "desert", "engine", "falcon",
    "feather", "forest", "garden", "glacier", "hammer", "harbor", "helmet", "island", "jacket",
    "kettle", "ladder", "lantern", "magnet", "meadow", "mirror", "nest", "ocean", "orchard",
    "palace", "pencil", "pillow", "planet", "pond", "quarry", "ribbon", "river", "rocket", "saddle",
    "shovel", "spoon", "teapot", "tunnel", "umbrella", "uniform", "valley", "violin", "wagon",
    "window", "yard", "zebra",
)  # fmt: skip
_GRASS = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
    "There and back again.",
)  # fmt: skip
_HIDDEN = (
    "Some secret numbers are hidden in the following text. Read it carefully; there will be a "
    "question about them at the end."
)
_OTHER_NEEDLES = 3
_CHAIN = 4
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXZ"

Layout: TypeAlias = Callable[[int], str]
"""Makes the context with that many pieces of filler."""


@dataclass(frozen=True, slots=True)
class Haystack:
    """A prompt and what must occur in the answer."""

    prompt: str
    answers: tuple[str, ...]
    tokens: int
    """Of the prompt, as its counter counts."""


@dataclass(frozen=True, slots=True)
class _Plan:
    layout: Layout
    query: str
    prefix: str
    answers: tuple[str, ...]

    def prompt(self, pieces: int) -> str:
        return f"{self.layout(pieces)}\n\n{self.query} {self.prefix}"


def make_haystack(
    kind: str, length: int, *, depth: float, seed: int, count_tokens: Callable[[str], int]
) -> Haystack:
    """Makes a prompt as long as fits.

    Args:
        kind: one of `KINDS`.
        length: most tokens of the prompt.
        depth: where the needle is, 0 (beginning) to 1 (end); variable_tracking spreads its
            assignments over the whole text instead.
        seed: another one gives another prompt.
        count_tokens: tokens of a prompt, special ones included.

    Returns:
        A prompt of at most `length` tokens, less than one more sentence or record below it.

    Raises:
        ValueError: unknown kind, a depth outside 0 to 1, or a length too short for any prompt.

    >>> words = lambda text: len(text.split())
    >>> stack = make_haystack("passkey", 60, depth=0.5, seed=0, count_tokens=words)
    >>> stack.tokens <= 60, stack.answers[0] in stack.prompt
    (True, True)
    """
    if kind not in _PLANS:
        raise ValueError(
            f"unknown haystack {kind!r}.{closest(kind, KINDS)} Available: {', '.join(KINDS)}."
        )
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be 0 (beginning) to 1 (end), got {depth}")
    plan = _PLANS[kind](random.Random(f"{kind}/{length}/{seed}"), depth)
    least = count_tokens(plan.prompt(0))
    if least > length:
        raise ValueError(f"a {kind} prompt has at least {least} tokens; length {length} is too few")
    pieces = _most(lambda n: count_tokens(plan.prompt(n)) <= length)
    prompt = plan.prompt(pieces)
    return Haystack(prompt, plan.answers, count_tokens(prompt))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where 0 does; one that was not tried is never taken."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _passkey(rng: random.Random, depth: float) -> _Plan:
    key = str(rng.randrange(10_000, 100_000))
    intro = (
        "There is an important piece of information hidden inside a lot of irrelevant text. Find "
        "it and remember it."
    )
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def layout(pieces: int) -> str:
        filler = [_GRASS[i % len(_GRASS)] for i in range(pieces)]
        return f"{intro}\n\n{' '.join(_put(filler, [(depth, needle)]))}"

    return _Plan(layout, "What is the pass key?", "The pass key is", (key,))


def _needles(rng: random.Random, depth: float, others: int) -> _Plan:
    names = _names(rng)[: others + 1]
    numbers = [str(n) for n in rng.sample(range(10_000, 100_000), others + 1)]
    depths = [depth, *(rng.random() for _ in range(others))]
    needles = [
        (where, f"The secret number of the {name} is {number}.")
        for where, name, number in zip(depths, names, numbers, strict=True)
    ]
    prose = _prose_from(rng)

    def layout(pieces: int) -> str:
        return f"{_HIDDEN}\n\n{' '.join(_put(prose(pieces), needles))}"

    prefix = f"The secret number of the {names[0]} is"
    return _Plan(layout, f"What is the secret number of the {names[0]}?", prefix, (numbers[0],))


def _records(rng: random.Random, depth: float) -> _Plan:
    names, numbers = _names(rng), random.Random(rng.random())
    asked, answer = names.pop(), str(rng.randrange(10_000, 100_000))
    drawn: list[str] = []

    def layout(pieces: int) -> str:
        for i in range(len(drawn), pieces):
            turn, place = divmod(i, len(names))
            name = names[place] + (f" {turn + 1}" if turn else "")
            number = int(answer)
            while number == int(answer):
                number = numbers.randrange(10_000, 100_000)
            drawn.append(f"The {name} box stores {number}.")
        lines = _put(drawn[:pieces], [(depth, f"The {asked} box stores {answer}.")])
        intro = "Below is a list of records. Each record gives the number stored in one box."
        return f"{intro}\n\n" + "\n".join(lines)

    question = f"What number is stored in the {asked} box?"
    return _Plan(layout, question, f"The {asked} box stores", (answer,))


def _variables(rng: random.Random, depth: float) -> _Plan:
    value, decoy = rng.sample(range(10_000, 100_000), 2)
    names: list[str] = []
    while len(names) < 2 * _CHAIN:
        name = "".join(rng.choices(_CONSONANTS, k=4))
        names += [name] if name not in names else []
    chains = [names[:_CHAIN], names[_CHAIN:]]
    steps = []
    for i in range(_CHAIN):
        for chain, number in rng.sample(list(zip(chains, (value, decoy), strict=True)), 2):
            steps.append(f"VAR {chain[i]} = " + (f"VAR {chain[i - 1]}" if i else str(number)))
    depths = sorted(rng.random() for _ in steps)
    prose = _prose_from(rng)
    intro = (
        "The following text contains variable assignments between ordinary sentences. Keep track "
        "of the value of each variable."
    )

    def layout(pieces: int) -> str:
        lines = _put(prose(pieces), list(zip(depths, steps, strict=True)))
        return f"{intro}\n\n" + "\n".join(lines)

    question = f"Which variables have the value {value}?"
    prefix = f"The variables with the value {value} are"
    return _Plan(layout, question, prefix, tuple(chains[0]))


_PLANS: dict[str, Callable[[random.Random, float], _Plan]] = {
    "passkey": _passkey,
    "niah_single": functools.partial(_needles, others=0),
    "niah_multikey": functools.partial(_needles, others=_OTHER_NEEDLES),
    "kv_retrieval": _records,
    "variable_tracking": _variables,
}
KINDS = tuple(_PLANS)
"""Kinds of haystacks."""


def _put(filler: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Filler with each needle between two pieces, at its share of the characters.

    Needles of one place keep their order.

    >>> _put(["aaa", "b"], [(0.7, "x"), (1.0, "y")])
    ['aaa', 'x', 'b', 'y']
    """
    pieces = list(filler)
    ends = [0, *itertools.accumulate(map(len, filler))]
    for depth, needle in sorted(needles, key=lambda one: one[0])[::-1]:
        place = depth * ends[-1]
        pieces.insert(min(range(len(ends)), key=lambda i: abs(ends[i] - place)), needle)
    return pieces


def _names(rng: random.Random) -> list[str]:
    names = [f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    rng.shuffle(names)
    return names


def _prose_from(rng: random.Random) -> Callable[[int], list[str]]:
    """Gives the next sentences from a random place on; after the last comes the first."""
    sentences = _sentences()
    start = rng.randrange(len(sentences))
    return lambda count: [sentences[(start + i) % len(sentences)] for i in range(count)]


@functools.cache
def _sentences() -> tuple[str, ...]:
    """Sentences of the prose, split at semicolons, without digits and without very long ones."""
    [(_, row)] = read_file(data_file(_PROSE))
    text = row["text"][row["text"].index(_BEGINNING) :]
    parts = re.split(r"(?<=[.!?;])\s+", " ".join(text.split()))
    return tuple(part for part in parts if len(part) <= _LONGEST and not re.search(r"\d", part))
