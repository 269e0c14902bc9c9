"""Patterns: bounded, right about samples, and exact about what could still become a match."""

from __future__ import annotations

import re

import pytest
from guard_samples import HARMLESS, NUMBERS, SECRETS

from meshlm.guard import pii, secrets
from meshlm.guard.patterns import MAX_LENGTH, Pattern, PatternSet

PATTERNS = (*secrets.PATTERNS, *pii.PATTERNS)
BLOCKING = PatternSet(pattern for pattern in PATTERNS if pattern.act == "block")
SAMPLES = [*SECRETS.items(), *((category, text) for category, texts in NUMBERS.items() for text in texts)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.category)
def test_no_pattern_is_longer_than_the_tail_that_is_held(pattern: Pattern) -> None:
    low, high = re._parser.parse(pattern.source).getwidth()  # type: ignore[attr-defined]  # a parser's own opinion
    assert 0 < low <= high <= MAX_LENGTH


@pytest.mark.parametrize(("category", "sample"), SAMPLES)
def test_a_published_form_is_found_where_it_stands(category: str, sample: str) -> None:
    text = f"It is {sample} as you asked."
    found = BLOCKING.first(text, 0, 0)
    assert found is not None
    finding, end = found
    assert finding.category == category
    assert finding.start == 6
    assert 6 < finding.end <= 6 + len(sample)
    assert end <= 6 + len(sample) + 1


@pytest.mark.parametrize("text", HARMLESS)
def test_a_look_alike_is_not_taken_for_a_secret_or_a_number(text: str) -> None:
    assert BLOCKING.first(text + "\n", 0, 0) is None


@pytest.mark.parametrize(("category", "sample"), SAMPLES)
def test_every_beginning_of_a_match_is_held_from_its_first_character(category: str, sample: str) -> None:
    found = BLOCKING.first(f"It is {sample} as", 0, 0)
    assert found is not None
    for length in range(1, found[1] - 6):
        assert BLOCKING.hold(f"It is {sample} as"[: 6 + length], 0) <= 6, sample[:length]


@pytest.mark.parametrize("text", ["Paris", "the end.", "It costs 12 euros", "a task", "x = y ", "naïve", "结束"])
def test_ordinary_prose_is_not_held(text: str) -> None:
    assert BLOCKING.hold(text, 0) == len(text)


@pytest.mark.parametrize(("text", "held"), [("It is A", 1), ("It is AK", 2), ("see -----BEGIN", 10), ("no. 41", 2)])
def test_what_could_become_a_secret_is_held_and_nothing_before_it(text: str, held: int) -> None:
    assert BLOCKING.hold(text, 0) == len(text) - held


def test_a_country_without_an_iban_is_no_iban() -> None:
    assert BLOCKING.first("US29NWBK60161331926819 ", 0, 0) is None


def test_iban_lengths_are_those_of_the_registry() -> None:
    # SWIFT's registry: Norway's are the shortest with 15 characters, Malta's have 31.
    patterns = PatternSet(pattern for pattern in pii.PATTERNS if pattern.category == "pii.iban")
    assert patterns.first("NO9386011117947 ", 0, 0) is not None
    assert patterns.first("MT84MALT011000012345MTLCAST001S ", 0, 0) is not None
