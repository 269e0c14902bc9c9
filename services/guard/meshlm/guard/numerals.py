"""Text as numbers: binary, octal and decimal codes of characters, and Morse.

Anybody writes lists of numbers, and lines of dots and dashes: what comes out counts only if it has words of English.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from meshlm.guard.ciphers import said

_SIGNS = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. ----- "
    ".---- ..--- ...-- ....- ..... -.... --... ---.. ----. .-.-.- --..-- ..--.. -.-.-- -..-. ---... .----. -....- "
    "-.--. -.--.-"
)
_MORSE = dict(zip(_SIGNS.split(), "abcdefghijklmnopqrstuvwxyz0123456789.,?!/:'-()", strict=True))
_DASHES = str.maketrans("–—−_·•", "----..")
BINARY = re.compile(r"(?<!\w)[01]{7,8}(?:[ ,]{0,2}+[01]{7,8}){7,}+(?!\w)")
OCTAL = re.compile(r"(?<!\w)[01][0-7]{2}(?:[ ,;-]{1,2}+[01][0-7]{2}){7,}+(?!\w)")
OCTAL_ESCAPES = re.compile(r"(?:\\[01][0-7]{2}){4,}+")
DECIMAL = re.compile(r"(?<!\w)\d{2,3}(?:[ ,;-]{1,2}+\d{2,3}){7,}+(?!\w)")
MORSE = re.compile(r"(?<![^\s\"'`(])[.\-–—−_·•]{1,6}(?:[ \t/|\n]{1,4}+[.\-–—−_·•]{1,6}){7,}+")
_MORSE_GAPS = re.compile(r"(\s*[/|\n]\s*|\s{2,})")


def binary(run: str) -> str | None:
    """Seven or eight bits a character, with or without anything between."""
    groups = re.findall(r"[01]+", run)
    if len(groups) == 1:
        groups = [run[at : at + 8] for at in range(0, len(run) - 7, 8)]
    return _meant(int(group, 2) for group in groups if len(group) <= 8)


def octal(run: str) -> str | None:
    """Three digits a character."""
    return _meant(int(digits, 8) for digits in re.findall(r"[0-7]{3}", run))


def decimal(run: str) -> str | None:
    """Two or three digits a character."""
    return _meant(int(digits) for digits in re.findall(r"\d+", run))


def morse(run: str) -> str | None:
    """Signs apart by one blank, words by more, by a stroke, or by a line's end."""
    read = [
        "".join(_MORSE.get(sign, "\0") for sign in word.split()) for word in _MORSE_GAPS.split(run.translate(_DASHES))
    ]
    text = " ".join(word for word in read if word and word != "\0")
    return text if "\0" not in text and said(text) else None


def _meant(codes: Iterable[int]) -> str | None:
    values = list(codes)
    if not all(32 <= value < 127 or value in (9, 10, 13) for value in values):
        return None
    text = "".join(map(chr, values))
    return text if said(text) else None
