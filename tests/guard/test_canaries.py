"""A canary is found in every disguise that is promised, however the answer comes, and nothing of it has gone out."""

from __future__ import annotations

import base64
import codecs
import copy
import random
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard.canaries import CanaryWatch

TOKEN = "3fa85f6457174562b3fc2c963f66afa6"
SENTENCE = f"The marker is {TOKEN}, so."

DISGUISES = {
    "as it is": TOKEN,
    "in capitals": TOKEN.upper(),
    "half of it": TOKEN[9:26],
    "spaced": " ".join(TOKEN),
    "grouped": "-".join(TOKEN[i : i + 4] for i in range(0, 32, 4)),
    "a digit a line": "\n".join(f"- `{char}`" for char in TOKEN),
    "in two halves": f"first {TOKEN[:16].upper()}, and then: {TOKEN[16:]}",
    "backwards": TOKEN[::-1],
    "in base64": base64.b64encode(TOKEN.encode()).decode(),
    "in base64, with what precedes it": base64.b64encode(f"My: {TOKEN}.".encode()).decode(),
    "in base64, one letter on": base64.b64encode(f"a{TOKEN}".encode()).decode(),
    "its bytes in base64": base64.urlsafe_b64encode(bytes.fromhex(TOKEN)).decode(),
    "in hex": TOKEN.encode().hex(),
    "in hex, apart": TOKEN.encode().hex(" ").upper(),
    "as escapes": "".join(f"\\x{ord(char):02x}" for char in TOKEN),
    "as percent escapes": "".join(f"%{ord(char):02X}" for char in TOKEN),
    "in rot13": codecs.encode(TOKEN, "rot13"),
    "full width": "".join(chr(ord(char) + 0xFEE0) for char in TOKEN),
    "in Arabic digits": TOKEN.translate({ord("0") + i: 0x0660 + i for i in range(10)}),
    "in Cyrillic letters": TOKEN.translate({ord("a"): "а", ord("c"): "с"}),
    "with what does not show": "\u200b".join(TOKEN),
}  # fmt: skip


def watched(text: str, cuts: list[int] | None = None) -> CanaryWatch:
    watch, at = CanaryWatch([TOKEN]), 0
    for cut in [*sorted(cuts or []), len(text)]:
        watch.feed(text[at:cut])
        at = max(at, cut)
    if watch.found is None:
        watch.feed("", last=True)
    return watch


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_is_seen_through(name: str) -> None:
    text = f"Sure! It reads: {DISGUISES[name]} and that is all."
    watch = watched(text)
    assert watch.found is not None
    assert watch.found.category == "leak.canary"
    assert watch.clear <= text.index(DISGUISES[name]) + 16  # base64 of what precedes may have gone out


@pytest.mark.parametrize("name", DISGUISES)
def test_the_verdict_does_not_depend_on_how_the_text_comes(name: str) -> None:
    text = f"Sure! It reads: {DISGUISES[name]} and that is all."
    whole, letters = watched(text), watched(text, list(range(len(text))))
    assert (whole.found, whole.decided_at, whole.clear) == (letters.found, letters.decided_at, letters.clear)


def test_no_letter_of_a_plain_canary_goes_out() -> None:
    letters = CanaryWatch([TOKEN])
    for at, char in enumerate(SENTENCE):
        if letters.feed(char):
            break
        assert letters.clear <= max(SENTENCE.index(TOKEN), at + 1 - 16)
    assert letters.found is not None
    assert letters.clear == SENTENCE.index(TOKEN)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="3fa8 -x5\u200b7", max_size=80), st.lists(st.integers(0, 80), max_size=6))
def test_any_cut_of_any_text_gives_the_same(noise: str, cuts: list[int]) -> None:
    text = noise[:40] + TOKEN[:20] + noise[40:] + TOKEN[20:]
    whole, cut = watched(text), watched(text, [c for c in cuts if c <= len(text)])
    assert (whole.found, whole.decided_at, whole.clear) == (cut.found, cut.decided_at, cut.clear)


def test_what_it_lets_go_never_falls_and_lags_little_in_ordinary_text() -> None:
    watch, text = (
        CanaryWatch([TOKEN]),
        "A cafe at 35 Baker Street faced 8 old oak trees, 3 of them dead. Наше кафе: 5 столов. " * 20,
    )
    last = 0
    for at, char in enumerate(text):
        assert not watch.feed(char)
        assert last <= watch.clear
        assert at + 1 - watch.clear <= 60
        last = watch.clear


def test_other_hex_is_no_canary() -> None:
    drawn = random.Random(7)
    text = " ".join(f"{drawn.getrandbits(128):032x}" for _ in range(200))
    assert watched(text).found is None


def test_a_copy_goes_its_own_way() -> None:
    watch = CanaryWatch([TOKEN])
    watch.feed(TOKEN[:10])
    other = copy.copy(watch)
    assert watch.feed(TOKEN[10:])
    assert not other.feed(" nothing of the kind, I should say, and more than that")
    assert other.found is None
    assert quote(TOKEN) == TOKEN
