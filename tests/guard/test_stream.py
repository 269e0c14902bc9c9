"""The output check: whatever the cut, the same verdict, and never a character of what is blocked."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from asking import feed
from guard_samples import NUMBERS, SECRETS
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard import pii, secrets
from meshlm.guard.config import PolicyConfig
from meshlm.guard.patterns import MAX_LENGTH
from meshlm.guard.policy import BLOCK, FLAG, Policy
from meshlm.guard.stream import OutputCheck

POLICY = Policy(PolicyConfig())
STRICT = Policy(PolicyConfig(actions={"pii.email": "block", "secret.assignment": "block", "pii.phone": "block"}))
PATTERNS = (*secrets.PATTERNS, *pii.PATTERNS)

_SAMPLES = [*SECRETS.values(), *(text for texts in NUMBERS.values() for text in texts)]
_FRAGMENTS = st.one_of(
    st.sampled_from(_SAMPLES),
    st.sampled_from(_SAMPLES).flatmap(lambda s: st.integers(0, len(s)).map(lambda n: s[:n])),
    st.sampled_from(_SAMPLES).flatmap(lambda s: st.integers(0, len(s)).map(lambda n: s[n:])),
    st.sampled_from(
        [" ", "\n", "-", ".", "eyJ", "sk-", "4", "a@b.example ", "api_key = ", "+49 30 901820 ", "A", "The end"]
    ),
    st.text(alphabet="AKIaeyJ.-_@+=0123456789 é结", max_size=12),
)
TEXTS = st.lists(_FRAGMENTS, max_size=6).map("".join)


def whole(policy: Policy, text: str) -> OutputCheck:
    check = policy.output_check()
    feed(check, text, last=True)
    return check


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("policy", [POLICY, STRICT], ids=["default", "strict"])
@given(cut_texts())
@settings(max_examples=150, deadline=None)
def test_verdict_and_release_do_not_depend_on_how_the_text_was_cut(policy: Policy, cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    expected = whole(policy, text)
    check, by_character = policy.output_check(), policy.output_check()
    for piece in pieces:
        feed(check, piece)
    feed(check, "", last=True)
    for character in text:
        feed(by_character, character)
    feed(by_character, "", last=True)
    for other in (check, by_character):
        assert other.blocked == expected.blocked
        assert other.flagged == expected.flagged
        assert other.released == expected.released


@given(cut_texts())
@settings(max_examples=150, deadline=None)
def test_nothing_of_a_blocked_match_is_ever_released(cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    blocked = whole(POLICY, text).blocked
    check, before = POLICY.output_check(), 0
    for piece in pieces:
        feed(check, piece)
        assert before <= check.released <= check.length
        if blocked is not None:
            assert check.released <= blocked.start
        else:
            assert check.length - check.released <= MAX_LENGTH
        before = check.released


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_an_answer_is_blocked_exactly_if_a_pattern_is_in_it(text: str) -> None:
    # Another engine, without streaming: every start, every pattern.
    found = False
    for pattern in PATTERNS:
        if pattern.act == "block":
            compiled = re.compile(f"(?<![A-Za-z0-9])({pattern.body}){pattern.after}")
            for start in range(len(text)):
                match = compiled.match(text + "\n", start)
                found = found or (match is not None and (pattern.check is None or pattern.check(match.group(1))))
    check = whole(POLICY, text)
    assert (check.blocked is not None) == found
    if not found:
        assert check.released == len(text)


@pytest.mark.parametrize("sample", _SAMPLES)
def test_a_secret_given_character_by_character_stops_before_its_first(sample: str) -> None:
    check = POLICY.output_check()
    for character in f"Here you are: {sample} and":
        feed(check, character)
    assert check.blocked is not None
    assert check.released == len("Here you are: ")
    assert POLICY.judge_output(check).action == BLOCK


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_was_held_for_another_match_stays_held_when_one_inside_it_is_decided(size: int) -> None:
    # A token begins, and a key inside it is complete first: cut by characters, nothing of the token was out by then.
    text = "see eyJ" + "a" * 10 + "-" + SECRETS["secret.aws_access_key"] + " and so on"
    check = POLICY.output_check()
    for at in range(0, len(text), size):
        feed(check, text[at : at + size])
    assert check.blocked is not None
    assert check.blocked.category == "secret.aws_access_key"
    assert check.released == len("see ")


def test_prose_is_released_at_once() -> None:
    check = POLICY.output_check()
    for word in [
        "The",
        "capital",
        "of",
        "France",
        "is",
        "Paris",
        "and",
        "it",
        "lies",
        "on",
        "the",
        "Seine",
        ",",
        "as",
        "everyone",
        "knows",
        ".",
    ]:
        feed(check, " " + word)
        assert check.released == check.length


def test_a_number_at_the_very_end_is_judged_by_the_end() -> None:
    check = POLICY.output_check()
    feed(check, "My card is 4111111111111111")
    assert check.blocked is None
    assert check.released == len("My card is ")
    feed(check, "", last=True)
    assert check.blocked is not None
    assert check.released == len("My card is ")


def test_addresses_are_told_and_do_not_hold() -> None:
    check = POLICY.output_check()
    feed(check, "Write to a.person@example.org")
    assert check.released == check.length
    feed(check, " or call +49 30 901820 now.", last=True)
    verdict = POLICY.judge_output(check)
    assert verdict.action == FLAG
    assert list(verdict.categories) == ["pii.email", "pii.phone"]
    assert check.released == check.length
    assert (verdict.char_start, verdict.char_end) == (9, 29)


def test_only_the_tail_is_kept_of_a_long_answer() -> None:
    check = POLICY.output_check()
    for _ in range(2_000):
        feed(check, "an ordinary word and then ")
    assert check.released == check.length == 52_000
    assert len(check._holding[0]._tail) <= MAX_LENGTH + 1
