"""Where an answer is judged, and what of it is read there."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard.lookback import Lookback, View

TEXTS = st.text(alphabet="abc é結🙂\n", max_size=300).map(lambda text: text * 12)


def places(text: str, pieces: list[str], windows: tuple[int, ...] = (16, 32, 64)) -> list[View]:
    look, views = Lookback(windows), []
    for piece in pieces:
        while piece:
            step = look.room(piece)
            if look.feed(piece[:step]):
                views.append(look.view())
            piece = piece[step:]
    assert look.length == len(text)
    return views


@given(TEXTS, st.lists(st.integers(0, 3_600), max_size=20))
@settings(max_examples=60, deadline=None)
def test_places_and_views_do_not_depend_on_how_the_text_came(text: str, cuts: list[int]) -> None:
    bounds = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in pairwise([0, *bounds, len(text)])]
    assert places(text, pieces) == places(text, [text]) == places(text, list(text))


def test_windows_are_16_then_32_then_64_tokens_of_4_bytes() -> None:
    assert [view.end for view in places("a" * 1_000, ["a" * 1_000])] == [64, 192, 448, 704, 960]


def test_characters_of_several_bytes_count_as_more_and_none_is_cut() -> None:
    text = "結" * 151  # 3 bytes each
    assert [view.end for view in places(text, [text])] == [22, 65, 151]  # 64 and then 128 and 256 bytes, rounded up


def test_a_short_answer_is_read_whole_and_a_long_one_by_its_beginning_and_its_end() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(5_000))
    views = places(text, [text])
    whole = [view for view in views if view.end <= 2_048]
    assert len(whole) > 5
    assert all(view.text == text[: view.end] for view in whole)
    for view in views[len(whole) :]:
        assert view.text.startswith(text[:256])
        assert view.text.endswith(text[view.end - 1_024 : view.end])
        assert len(view.text) < 256 + 1_024 + 20


@given(TEXTS.map(lambda text: text + "ab結🙂c" * 300), st.data())
@settings(max_examples=60, deadline=None)
def test_a_range_of_a_view_is_the_same_characters_of_the_answer(text: str, data: st.DataObject) -> None:
    view = places(text, [text])[-1]
    start = data.draw(st.integers(0, len(view.text) - 1))
    end = data.draw(st.integers(start, len(view.text)))
    placed = view.place(start, end)
    assert 0 <= placed[0] <= placed[1] <= view.end
    read = view.text[start:end]
    if "[...]" not in view.text[max(0, start - 8) : end + 8]:
        assert text[placed[0] : placed[1]] == read
