"""Text inside text, unwrapped once: base64, 32 and 85, hex, escapes of the web, of mail and of programs, Unicode tags,
codes of characters, Morse, and ciphers of letters.

What comes out counts only if it is readable UTF-8. Runs are found by possessive patterns, in linear time.
"""

from __future__ import annotations

import base64
import binascii
import html
import quopri
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from urllib.parse import unquote_plus

from meshlm.guard import numerals
from meshlm.guard.ciphers import deciphered


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
    for form, payload, start, end in deciphered(text):
        yield Unwrapped(form, payload, start, end)


def _base64(run: str) -> str | None:
    data = run.rstrip("=").replace("-", "+").replace("_", "/")
    if len(data) % 4 == 1:
        data = data[:-1]
    return _utf8(lambda: base64.b64decode(data + "=" * (-len(data) % 4)))


def _base32(run: str) -> str | None:
    data = run.rstrip("=")
    data = data[: len(data) - (0, 1, 0, 1, 0, 0, 1, 0)[len(data) % 8]]
    return _utf8(lambda: base64.b32decode(data + "=" * (-len(data) % 8)))


def _base85(run: str) -> str | None:
    """Of Adobe's kind, of git's and of ZeroMQ's; what stands around it may be of the sentence."""
    kinds = set(run)
    if len(kinds & _MARKS) < _LEAST_MARKS or kinds.isdisjoint(ascii_uppercase) or kinds.isdisjoint(ascii_lowercase):
        return None
    framed = run.partition("<~")[2].partition("~>")[0]
    for start in (0, 1):  # a bracket or quotation mark
        data = framed or run[start:]
        for begins, decode in _BASES_85:
            if begins.match(data) and _begins_readable(decode, data):
                for end in range(len(data), len(data) - 4, -1):
                    text = _utf8(partial(decode, data[:end]))
                    if text is not None and _readable(text):
                        return text
    return None


def _begins_readable(decode: Callable[[str], bytes], data: str) -> bool:
    """Whether some of it is text, which is quickly known."""
    try:
        head = decode(data[:40])
    except ValueError:
        return False
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) >= len(head) - 3 and _readable(text)


def _z85(data: str) -> bytes:
    if not _OF_Z85.issuperset(data):
        raise ValueError("not of z85's characters")
    return base64.b85decode(data.translate(_Z85))


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


def _entities(run: str) -> str:
    return html.unescape(run)


def _printable(run: str) -> str | None:
    """Quoted-printable, as in mails."""
    text = _utf8(lambda: quopri.decodestring(run.encode()))
    return text if text is not None and all(char.isprintable() or char.isspace() for char in text) else None


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


_ENTITY = r"[^\s&]{0,20}+&#[xX]?[0-9a-fA-F]{1,6};[^\s&]{0,20}+"
# Its name, what a text with one has somewhere, its pattern, and what is in it.
_Wrapping = tuple[str, str, re.Pattern[str], Callable[[str], str | None]]
_ASCII_WRAPPINGS: tuple[_Wrapping, ...] = (
    ("base64", "", re.compile(r"[A-Za-z0-9+/_-]{16,}+={0,2}"), _base64),
    ("base32", "", re.compile(r"(?<![A-Za-z0-9])[A-Z2-7]{16,}+={0,6}"), _base32),
    # Nothing but a long run of many kinds of characters, as addresses and code have them too.
    ("base85", "", re.compile(r"(?<!\S)(?=\S*[!#$%&*;<>?@^`{|}~(])[!-~]{20,}+"), _base85),
    ("binary", "01", numerals.BINARY, numerals.binary),
    ("octal", "040", numerals.OCTAL, numerals.octal),
    ("octal", "\\1", numerals.OCTAL_ESCAPES, numerals.octal),
    ("decimal", "32", numerals.DECIMAL, numerals.decimal),
    ("morse", "", numerals.MORSE, numerals.morse),
    ("entities", "&#", re.compile(rf"{_ENTITY}(?:\s?+{_ENTITY}){{3,}}+"), _entities),
    (
        "quoted-printable",
        "=",
        re.compile(r"(?<!\S)[^\s=&?]{0,60}+(?:=(?:[0-9A-F]{2}|\r?\n)[^\s=&?]{0,60}+){2,}+"),
        _printable,
    ),
    ("hex", "", re.compile(r"(?<![0-9a-zA-Z])(?:0x)?(?:[0-9a-fA-F]{2}){8,}+"), _hex),
    ("hex", "", re.compile(r"(?<![0-9a-zA-Z])(?:0x)?[0-9a-fA-F]{2}(?:[ :,-]{1,2}+(?:0x)?[0-9a-fA-F]{2}){7,}+"), _hex),
    ("hex", "\\x", re.compile(r"(?:\\x[0-9a-fA-F]{2}){4,}+"), _hex),
    ("escapes", "\\u", re.compile(r"(?:\\u[0-9a-fA-F]{4}){4,}+"), _escapes),
    ("percent", "%", re.compile(r"(?<!\S)[^\s%]{0,400}+(?:%[0-9a-fA-F]{2}[^\s%]{0,400}+){2,}+"), _percent),
)
# A flag's subdivision is spelled with tags too, behind a black flag.
_TAGS: _Wrapping = ("tags", "", re.compile(r"(?<!\U0001f3f4)[\U000e0020-\U000e007e]{4,}+"), _tags)
# What nearly every text in base 85 has some of.
_MARKS = frozenset("!#$%&*;<>?@^`{|}~(+-=)_")
_LEAST_MARKS = 3
_ADOBE = "".join(map(chr, range(33, 118)))
_GIT = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_ZEROMQ = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_Z85 = str.maketrans(_ZEROMQ, _GIT)
_OF_Z85 = frozenset(_ZEROMQ)


def _groups(digits: str) -> re.Pattern[str]:
    """Three groups of five digits, the first of each as it is where four characters begin with one of ASCII."""
    return re.compile(f"(?:[{re.escape(digits[10:41])}].{{4}}){{3}}")


_BASES_85: tuple[tuple[re.Pattern[str], Callable[[str], bytes]], ...] = (
    (_groups(_ADOBE), base64.a85decode),
    (_groups(_GIT), base64.b85decode),
    (_groups(_ZEROMQ), _z85),
)
