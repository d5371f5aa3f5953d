"""Prompts fit any length, hold what they ask for once, and are the same for the same seed."""

from __future__ import annotations

import doctest
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefold.evaluation import haystack
from cachefold.evaluation.haystack import KINDS, make_haystack

SLACK = 80


def _count(text):
    """A tokenizer in small: words, and punctuation marks on their own."""
    return 1 + len(re.findall(r"\w+|[^\w\s]", text))


def _make(kind, length=600, depth=0.5, seed=0):
    return make_haystack(kind, length, depth=depth, seed=seed, count_tokens=_count)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), length=st.integers(170, 3000), depth=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_prompts_fill_their_length_and_never_exceed_it(kind, length, depth, seed):
    stack = _make(kind, length, depth, seed)
    assert stack.tokens == _count(stack.prompt) and length - SLACK < stack.tokens <= length
    assert stack == _make(kind, length, depth, seed)
    assert stack.prompt != _make(kind, length, depth, seed + 1).prompt


@settings(max_examples=40, deadline=None)
@given(length=st.integers(20, 400), kind=st.sampled_from(KINDS))
def test_lengths_that_are_too_short_are_refused(length, kind):
    try:
        assert _make(kind, length).tokens <= length
    except ValueError as error:
        least = int(re.search(r"at least (\d+) tokens", str(error))[1])
        assert least > length and _make(kind, least).tokens == least


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "variable_tracking"]),
    depth=st.floats(0, 1), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_answer_is_there_once_at_its_depth(kind, depth, seed):
    stack = _make(kind, 3000, depth, seed)
    [answer] = stack.answers
    context, question = stack.prompt.rsplit("\n\n", 1)
    body = context.split("\n\n", 1)[1]
    assert body.count(answer) == (2 if kind == "passkey" else 1) and answer not in question
    assert abs(body.index(answer) / len(body) - depth) < 0.03
    prefix = question[question.index("? ") + 2 :]
    assert re.search(rf"{re.escape(prefix)} {answer}\b", body)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_following_the_assignments_gives_the_variables_asked_for(seed):
    stack = _make("variable_tracking", 1500, 0.0, seed)
    values = {}
    for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", stack.prompt, re.MULTILINE):
        values[name] = values.get(source, source)
    asked = re.search(r"have the value (\d+)\?", stack.prompt)[1]
    assert tuple(name for name, value in values.items() if value == asked) == stack.answers
    assert len(stack.answers) == 4 and len(values) == 8 and len(set(values.values())) == 2


def test_other_needles_have_other_names_and_numbers():
    pairs = re.findall(r"secret number of the (\w+ \w+) is (\d+)", _make("niah_multikey").prompt)
    assert len(pairs) == 4 == len({name for name, _ in pairs}) == len({n for _, n in pairs})


def test_records_have_names_of_their_own_however_many_there_are():
    prompt = _make("kv_retrieval", 50_000).prompt
    names = re.findall(r"^The (.+) box stores \d+\.$", prompt, re.MULTILINE)
    assert len(names) > 5000 and len(set(names)) == len(names)


def test_prose_goes_on_from_its_beginning():
    assert _make("niah_single", 60_000).tokens > 60_000 - SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_fit_a_real_tokenizer(kind):
    tokenizer = pytest.importorskip("cachefold.zoo").load_base("smollm2-135m")[1]

    def count(text):
        return len(tokenizer(text)["input_ids"])

    for length in (256, 1024, 4096):
        stack = make_haystack(kind, length, depth=0.3, seed=length, count_tokens=count)
        assert length - SLACK < len(tokenizer(stack.prompt)["input_ids"]) <= length


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'passkey'"):
        _make("passkeys")
    with pytest.raises(ValueError, match="depth must be 0"):
        _make("passkey", depth=1.5)


def test_examples_run():
    assert doctest.testmod(haystack).failed == 0
