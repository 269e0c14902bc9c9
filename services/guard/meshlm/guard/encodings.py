"""Text inside text: base64, hex, percent and backslash escapes, Unicode tags, rot13 and text backwards, unwrapped once.

What comes out counts only if it is readable UTF-8. Runs are found by possessive patterns, in linear time.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote_plus


@dataclass(frozen=True)
class Unwrapped:
    """A payload, and the range of the original that carries it."""

    form: str
    text: str
    start: int
    end: int

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Range of the original that a range of the payload came from: its carrier, whatever the range."""
        return self.start, self.end


def unwrap(text: str) -> Iterator[Unwrapped]:
    """All readable payloads, in no particular order; each is about as long as its carrier at most."""
    wrappings = _ASCII_WRAPPINGS if text.isascii() else (*_ASCII_WRAPPINGS, _TAGS)
    for form, sign, pattern, decode in wrappings:
        for match in pattern.finditer(text) if sign in text else ():
            payload = decode(match.group())
            if payload is not None and _readable(payload):
                yield Unwrapped(form, payload, match.start(), match.end())
    for match in _LINE.finditer(text):
        said = _words(match.group())
        for form, words, decipher in _CIPHERS:
            if sum(map(len, said & words)) >= _MEANT:
                yield Unwrapped(form, decipher(match.group()), match.start(), match.end())


def _base64(run: str) -> str | None:
    data = run.rstrip("=").replace("-", "+").replace("_", "/")
    if len(data) % 4 == 1:
        data = data[:-1]
    return _utf8(lambda: base64.b64decode(data + "=" * (-len(data) % 4)))


def _hex(run: str) -> str | None:
    digits = re.sub(r"0x|\\x|[^0-9a-fA-F]", "", run)
    return _utf8(lambda: bytes.fromhex(digits[: len(digits) // 2 * 2]))


def _utf8(decode: Callable[[], bytes]) -> str | None:
    try:
        return decode().decode("utf-8")
    except (binascii.Error, ValueError):
        return None


def _escapes(run: str) -> str:
    return "".join(chr(int(digits, 16)) for digits in re.findall(r"\\u([0-9a-fA-F]{4})", run))


def _percent(run: str) -> str | None:
    return unquote_plus(run) if run.count("%") >= 2 else None


def _tags(run: str) -> str:
    return "".join(chr(ord(char) - 0xE0000) for char in run)


def _readable(text: str) -> bool:
    """Whether at least nine in ten characters print, and some are letters."""
    if len(text) < 8:
        return False
    printing = sum(char.isprintable() or char in "\n\r\t" for char in text)
    return printing * 10 >= len(text) * 9 and any(char.isalpha() for char in text)


def _words(line: str) -> set[str]:
    """The distinct runs of letters, in lower case."""
    if line.isascii():
        return set(line.encode().translate(_LOWER).decode().split())
    return {run.translate(_CASED).lower() for run in _RUN.findall(line)}


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _reversed(text: str) -> str:
    return text[::-1]


_LINE = re.compile(r"[^\n]{8,}+")
# English is known in a cipher by its common words, and by what attacks are about. Other languages and names have one of
# these by chance, and rarely two: with so many letters of them, a line is meant.
_MEANT = 10
_COMMON = (
    *("this", "that", "with", "your", "from", "have", "will", "what", "when", "which", "would", "should", "about"),
    *("ignore", "disregard", "forget", "previous", "above", "system", "prompt", "instructions", "rules", "reveal"),
    *("pretend", "unrestricted", "password", "secret", "without", "restrictions", "guidelines", "respond", "write"),
    *("following", "message", "answer", "question", "explain", "make", "every", "under", "never", "must", "them"),
    *("please", "tell", "show", "they"),
)
_CIPHERS: tuple[tuple[str, frozenset[str], Callable[[str], str]], ...] = (
    ("rot13", frozenset(map(_rot13, _COMMON)), _rot13),
    ("reversed", frozenset(map(_reversed, _COMMON)), _reversed),
)
# Letters in lower case, and blanks for all else.
_LOWER = bytes(byte | 32 if chr(byte).isalpha() and byte < 128 else 32 for byte in range(256))
_RUN = re.compile(r"[^\W\d_]+")
_CASED = str.maketrans("ſİı", "sii")  # letters that are another's in some case
# Its name, what a text with one has somewhere, its pattern, and what is in it.
_Wrapping = tuple[str, str, re.Pattern[str], Callable[[str], str | None]]
_ASCII_WRAPPINGS: tuple[_Wrapping, ...] = (
    ("base64", "", re.compile(r"[A-Za-z0-9+/_-]{16,}+={0,2}"), _base64),
    ("hex", "", re.compile(r"(?<![0-9a-zA-Z])(?:0x)?(?:[0-9a-fA-F]{2}){8,}+"), _hex),
    ("hex", "", re.compile(r"(?<![0-9a-zA-Z])(?:0x)?[0-9a-fA-F]{2}(?:[ :,-]{1,2}+(?:0x)?[0-9a-fA-F]{2}){7,}+"), _hex),
    ("hex", "\\x", re.compile(r"(?:\\x[0-9a-fA-F]{2}){4,}+"), _hex),
    ("escapes", "\\u", re.compile(r"(?:\\u[0-9a-fA-F]{4}){4,}+"), _escapes),
    ("percent", "%", re.compile(r"(?<!\S)[^\s%]{0,400}+(?:%[0-9a-fA-F]{2}[^\s%]{0,400}+){2,}+"), _percent),
)
# A flag's subdivision is spelled with tags too, behind a black flag.
_TAGS: _Wrapping = ("tags", "", re.compile(r"(?<!\U0001f3f4)[\U000e0020-\U000e007e]{4,}+"), _tags)
