"""Canaries: tokens hidden in a system prompt, looked for in answers. An answer that holds one leaks the prompt.

They are looked for in what is left of the answer once case, separators, spacing, look-alike and invisible characters
are gone: as they are, backwards, as the hex or percent escapes of their letters, in base64 (of either case, whatever
stands before), and in rot13. Half of one is enough, except in base64. Not seen: digits in words, other ciphers, a
token told in pieces more than `_GAP` characters apart.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshlm.guard.findings import Finding
from meshlm.guard.normalize import skeleton

CATEGORY = "leak.canary"
VERSION = "canary/1"
DIGITS = 32  # hex digits of a canary
_ENOUGH = DIGITS // 2  # 64 bits: by chance in one answer of a million characters in 10^12
_GAP = 24  # characters between two letters of a canary, at most

_HEX = frozenset("0123456789abcdef")
_WORDS = _HEX | frozenset("ghijklmnopqrstuvwxyz")


def is_canary(token: str) -> bool:
    """Whether it has the form of one."""
    return len(token) == DIGITS and _HEX.issuperset(token.lower())


class _Needles:
    """What is looked for in the characters of one alphabet."""

    def __init__(self, alphabet: frozenset[str], whole: set[str]) -> None:
        self.alphabet = alphabet
        self.whole = frozenset(whole)
        self.begun = frozenset(needle[:end] for needle in whole for end in range(1, len(needle)))
        self.lengths = sorted({len(needle) for needle in whole})


@dataclass(frozen=True)
class _Begun:
    """The longest end of the text, in characters of an alphabet as they are read, that begins a needle; and where each
    of them stands."""

    text: str = ""
    places: tuple[int, ...] = ()

    def held(self, length: int) -> int:
        """The least place of a text of so many characters from which it could still become a needle."""
        alive = self.places and length - self.places[-1] <= _GAP
        return self.places[0] if alive else length

    def take(self, needles: _Needles, letter: str, place: int) -> _Begun | int:
        """With the next letter; or the place where a needle begins that is complete with it."""
        text, places = self.text + letter, (*self.places, place)
        if self.places and place - self.places[-1] > _GAP:
            text, places = letter, (place,)
        for length in needles.lengths:
            if length > len(text):
                break
            if text[-length:] in needles.whole:
                return places[-length]
        start = 0
        while start < len(text) and text[start:] not in needles.begun:
            start += 1
        return _Begun(text[start:], places[start:])


class CanaryWatch:
    """A `Watch` for canaries, each of 32 hex digits."""

    def __init__(self, canaries: Sequence[str]) -> None:
        self._needles = _needles(tuple(canaries))
        self._begun = tuple(_Begun() for _ in self._needles)
        self._length = 0
        self.found: Finding | None = None
        self.decided_at = 0
        self.clear = 0

    def feed(self, text: str, *, last: bool = False) -> bool:
        """See `Watch`."""
        if self.found is not None:
            return True
        begun = list(self._begun)
        for place, char in enumerate(text, self._length):
            for letter in skeleton(char):
                for index, needles in enumerate(self._needles):
                    if letter not in needles.alphabet or not (begun[index].text or letter in needles.begun):
                        continue
                    taken = begun[index].take(needles, letter, place)
                    if isinstance(taken, int):
                        # What was let go by then is what would have been, had the text come letter by letter.
                        self.feed(text[: place - self._length])
                        self.found = Finding("canary", CATEGORY, 1.0, taken, place + 1)
                        self.decided_at = place + 1
                        return True
                    begun[index] = taken
        self._length += len(text)
        self._begun = tuple(begun)
        self.clear = min((b.held(self._length) for b in begun), default=self._length)
        return False


@lru_cache(maxsize=64)
def _needles(canaries: tuple[str, ...]) -> tuple[_Needles, ...]:
    """For each alphabet what is looked for in it."""
    digits: set[str] = set()
    words: set[str] = set()
    for canary in canaries:
        token = canary.lower()
        digits |= _windows(token, _ENOUGH) | _windows(token[::-1], _ENOUGH)
        for variant in (token, token.upper(), token[::-1]):
            digits |= _windows(variant.encode().hex(), 2 * _ENOUGH, 2)
            words |= _in_base64(variant.encode())
        words |= _in_base64(bytes.fromhex(token))
        words |= _windows(codecs.encode(token, "rot13"), _ENOUGH)
    return (_Needles(_HEX, digits), _Needles(_WORDS, words)) if canaries else ()


def _windows(text: str, size: int, step: int = 1) -> set[str]:
    return {text[start : start + size] for start in range(0, len(text) - size + 1, step)}


def _in_base64(data: bytes) -> set[str]:
    """The characters that are sure, at each of the three places that data may have in a longer text."""
    found = set()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + data).decode().rstrip("=")
        sure = encoded[-(-shift * 8 // 6) : (shift + len(data)) * 8 // 6]
        found.add("".join(char for char in sure.lower() if char in _WORDS))
    return found
