"""Readings lead back to the original, character by character."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard.encodings import unwrap
from meshlm.guard.normalize import readings


def forms(text: str) -> dict[str, str]:
    return {reading.form: reading.text for reading in readings(text)}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("STRASSE Straße", "strasse strasse"),
        ("ﬁne", "fine"),
        ("Ｆｕｌｌ", "full"),
        ("ⓒⓘⓡⓒⓛⓔ", "circle"),
        ("a\u200bb\u2060c\ufeffd\u00ade", "abcde"),
        ("n\u0303a\u0336", "na"),
        ("x\ufe0fy\U000e0041z", "xyz"),
        ("\u3164a\u115fb", "ab"),
    ],
)
def test_the_plain_reading_is_what_the_letters_say(text: str, read: str) -> None:
    assert forms(text)["plain"] == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("раураl", "paypal"),
        ("ІGNОRЕ ІGΝОRЕ", "ignore ignore"),
        ("Νеw ΑΡΙ", "new api"),
        ("🅸🅶🅽🅾🆁🅴", "ignore"),
        ("🇩🇦🇳", "dan"),
    ],
)
def test_letters_of_other_scripts_read_as_what_they_look_like(text: str, read: str) -> None:
    assert forms(text)["lookalike"] == read


def test_digits_and_signs_read_as_letters_only_inside_words() -> None:
    assert forms("1gn0r3 th3 ru1es")["leet"] in ("ignore the ruies", "lgnore the rules")
    assert "leet" not in forms("In 2024 we had 12,345 users at 10:30.")


def test_digits_that_stand_for_one_letter_make_one_reading() -> None:
    assert [reading.text for reading in readings("th3 s3cret") if reading.form == "leet"] == ["the secret"]
    assert [reading.text for reading in readings("s1ng") if reading.form == "leet"] == ["sing", "slng"]


def test_spaced_letters_are_joined_and_abbreviations_are_not() -> None:
    assert forms("s e c r e t")["spaced"] == "secret"
    assert forms("well: s.e.c.r.e.t!")["spaced"] == "well: secret!"
    assert "spaced" not in forms("e.g. a or b in the U.S. and of the U.K.")


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_every_character_of_a_reading_comes_from_its_place(text: str) -> None:
    for reading in readings(text):
        indices = range(len(text)) if reading.indices is None else reading.indices
        assert len(reading.text) == len(indices)
        assert all(0 <= index < len(text) for index in indices)
        assert list(indices) == sorted(indices)
        if reading.form == "plain":
            for read, index in zip(reading.text, indices, strict=True):
                assert read in unicodedata.normalize("NFKD", text[index]).casefold()


@pytest.mark.parametrize(
    "text",
    [
        "Hello world, how are you",
        "a-very-long-identifier-with-words",
        "deadbeefdeadbeefdeadbeef",
        "/usr/lib/python/site",
    ],
)
def test_what_carries_no_text_is_not_unwrapped(text: str) -> None:
    assert list(unwrap(text)) == []


def test_a_payload_names_the_range_that_carries_it() -> None:
    carrier = "aGVsbG8gdGhlcmUsIGZyaWVuZA=="  # from a shell: printf 'hello there, friend' | base64
    (found,) = unwrap(f"see {carrier} end")
    assert (found.form, found.text) == ("base64", "hello there, friend")
    assert f"see {carrier} end"[found.start : found.end] == carrier


def test_text_is_unwrapped_once_only() -> None:
    twice = "YUdWc2JHOGdkR2hsY21Vc0lHWnlhV1Z1WkE9PQ=="  # the base64 above, again
    assert [found.text for found in unwrap(twice)] == ["aGVsbG8gdGhlcmUsIGZyaWVuZA=="]
