"""Stop strings: the first one ends the text, nothing of it leaks, nothing is held that need not be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.worker.text.stop_strings import StopStrings

FEW = st.text("ab<", min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: character for character, the stop that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(st.text("ab<", max_size=4), max_size=12), stops=st.lists(FEW, max_size=4))
def test_what_is_given_out_follows_from_the_text_alone(pieces: list[str], stops: list[str]) -> None:
    stream = StopStrings(stops)
    given_out = "".join([stream.push(piece) for piece in pieces] + [stream.flush()])
    assert (given_out, stream.matched) == first_stop("".join(pieces), stops)


@given(text=st.text("ab<", max_size=20), stops=st.lists(FEW, min_size=1, max_size=4))
def test_only_a_possible_beginning_is_held_and_the_longest_one(text: str, stops: list[str]) -> None:
    stream, given_out = StopStrings(stops), ""
    for end, character in enumerate(text, 1):
        given_out += stream.push(character)
        if stream.matched is not None:
            return
        held = text[len(given_out) : end]
        beginnings = [text[start:end] for start in range(end + 1)]
        longest = next(tail for tail in beginnings if any(s.startswith(tail) and s != tail for s in stops))
        assert held == longest


def test_after_a_match_the_stream_stays_silent() -> None:
    stream = StopStrings(["STOP"])
    assert [stream.push("one ST"), stream.push("OP two"), stream.push("three"), stream.flush()] == ["one ", "", "", ""]
    assert stream.matched == "STOP"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
