"""Readings of a text: the forms that a model may read as plain words, each with the way back to the original.

The text itself is never changed; readings exist for matching only, so scripts that need joiners and marks (Persian,
Indic scripts, emoji) lose nothing. Every reading is made in one pass, in time linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from confusable_homoglyphs import confusables  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Reading:
    """One form of a text."""

    # How it came about: `plain`, `lookalike`, `leet`, `spaced`, or what `encodings` unwrapped.
    form: str
    text: str
    # For each character, its index in the original; None where they are the same.
    indices: Sequence[int] | None = None
    # Whether this form hides words from a plain reader.
    hidden: bool = False

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Range of the original that reads as [start, end). Empty ranges are not meant."""
        if self.indices is None:
            return start, end
        return self.indices[start], self.indices[end - 1] + 1


def readings(text: str) -> Iterator[Reading]:
    """The forms of a text that differ from each other, the plain one first."""
    plain = _mapped("plain", text, _FOLD)
    yield plain
    latin = plain
    if not text.isascii():
        latin = _mapped("lookalike", text, _SKELETON, hidden=True)
        if latin.text != plain.text:
            yield latin
    if _LEET_SIGN.search(latin.text) and _LEET_WORD.search(latin.text):
        # One digit stands for two letters.
        for one in "il" if "1" in latin.text else "i":
            table = _LEET | {ord("1"): one}
            yield Reading("leet", latin.text.translate(table), latin.indices, hidden=True)
    if _SPACED.search(latin.text):
        yield _joined(latin)


def fold(pattern: str) -> str:
    """A pattern written in natural spelling, as the plain reading spells it: decomposed, and without marks."""
    return "".join(c for c in unicodedata.normalize("NFKD", pattern) if unicodedata.category(c) != "Mn")


def skeleton(char: str) -> str:
    """What one character looks like: ASCII in lower case where it can, nothing where it does not show."""
    if char.isascii():
        return char.lower()
    digit = unicodedata.digit(char, None)
    return _SKELETON[char] if digit is None else str(digit)


class _Table(dict[str, str]):
    """Characters to what they read as; filled as they are met."""

    def __init__(self, lookalikes: dict[str, str]) -> None:
        super().__init__()
        self._lookalikes = lookalikes

    def __missing__(self, char: str) -> str:
        read = "".join(self._one(c) for c in unicodedata.normalize("NFKD", char)).casefold()[:_LONGEST]
        if len(self) < 100_000:
            self[char] = read
        return read

    def _one(self, char: str) -> str:
        if char in self._lookalikes:
            return self._lookalikes[char]
        # Marks (accents, variation selectors) and format characters (zero-width, bidi, tags) are not read.
        if unicodedata.category(char) in ("Mn", "Me", "Cf") or char in _FILLERS:
            return ""
        return char


def _mapped(form: str, text: str, table: _Table, *, hidden: bool = False) -> Reading:
    if text.isascii():
        return Reading(form, text.lower())
    pieces: list[str] = []
    indices: list[int] = []
    for index, char in enumerate(text):
        read = table[char]
        if read:
            pieces.append(read)
            if len(read) == 1:
                indices.append(index)
            else:
                indices += [index] * len(read)
    return Reading(form, "".join(pieces), indices, hidden)


def _joined(reading: Reading) -> Reading:
    """Spaced-out letters (`i g n o r e`) joined; words run together, which the signatures allow for."""
    pieces: list[str] = []
    indices: list[int] = []

    def keep(start: int, end: int) -> None:
        pieces.append(reading.text[start:end])
        indices.extend(range(start, end) if reading.indices is None else reading.indices[start:end])

    done = 0
    for match in _SPACED.finditer(reading.text):
        keep(done, match.start())
        for at in range(match.start(), match.end()):
            if reading.text[at].isalnum():
                keep(at, at + 1)
        done = match.end()
    keep(done, len(reading.text))
    return Reading("spaced", "".join(pieces), indices, hidden=True)


def _lookalikes() -> dict[str, str]:
    """Letters of other scripts to the ASCII letter they look like (Unicode TR39 data), and letters in boxes."""
    found = {}
    for char, alike in confusables.confusables_data.items():
        if len(char) == 1 and not char.isascii() and unicodedata.category(char)[0] == "L":
            letters = [a["c"] for a in alike if a["c"].isascii() and a["c"].isalpha() and len(a["c"]) == 1]
            if letters:
                found[char] = letters[0]
    # Capital i: the data has one prototype for I and l.
    for char in "ІΙӀ":
        found[char] = "I"
    # Regional indicators; negative circled and negative squared letters: NFKC leaves them.
    for first in (0x1F1E6, 0x1F150, 0x1F170):
        found |= {chr(first + i): chr(ord("a") + i) for i in range(26)}
    return found


# Letters that show as nothing.
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")
# Some ligatures spell a whole phrase; a text of those must not grow without bound. Characters.
_LONGEST = 4
_FOLD = _Table({})
_SKELETON = _Table(_lookalikes())
_LEET = {ord(sign): letter for sign, letter in zip("034578@$!|€", "oeastbasile", strict=True)}
# A letter, then a digit or sign, then a letter: worth a reading.
_LEET_WORD = re.compile(r"[a-z][0134578@$!|][a-z]|(?<![\w@$])[0134578@$!|][a-z]{3}")
_LEET_SIGN = re.compile(r"[0134578@$!|][a-z]")
# Four or more single letters with one to three separators between.
_SPACED = re.compile(r"(?<!\w)\w(?:[\s.\-_*|/,+~]{1,3}+\w(?!\w)){4,}+")
