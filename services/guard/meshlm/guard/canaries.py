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
class _Kept:
    """The last characters of an alphabet in the text, as they are read, and where each stands."""

    text: str = ""
    places: tuple[int, ...] = ()


class CanaryWatch:
    """A `Watch` for canaries, each of 32 hex digits."""

    def __init__(self, canaries: Sequence[str]) -> None:
        self._needles = _needles(tuple(canaries))
        self._kept = tuple(_Kept() for _ in self._needles)
        self._length = 0
        self.found: Finding | None = None
        self.decided_at = 0
        self.clear = 0

    def feed(self, text: str, *, last: bool = False) -> bool:
        """See `Watch`."""
        if self.found is not None:
            return True
        kept = [(list(k.text), list(k.places)) for k in self._kept]
        for place, char in enumerate(text, self._length):
            read = skeleton(char)
            if not read:
                continue
            for needles, (chars, places) in zip(self._needles, kept, strict=True):
                start = _take(needles, chars, places, read, place)
                if start is not None:
                    # What was let go by then is what would have been, had the text come letter by letter.
                    self.feed(text[: place - self._length])
                    self.found = Finding("canary", CATEGORY, 1.0, start, place + 1)
                    self.decided_at = place + 1
                    return True
        self._length += len(text)
        longest = [needles.lengths[-1] for needles in self._needles]
        self._kept = tuple(
            _Kept("".join(chars[-most:]), tuple(places[-most:]))
            for most, (chars, places) in zip(longest, kept, strict=True)
        )
        held = (_held(n, k, self._length) for n, k in zip(self._needles, self._kept, strict=True))
        self.clear = min(held, default=self._length)
        return False


def _take(needles: _Needles, chars: list[str], places: list[int], read: str, place: int) -> int | None:
    """Add what a character reads as. Where a needle begins that is complete now, or None."""
    for letter in read:
        if letter not in needles.alphabet:
            continue
        if places and place - places[-1] > _GAP:
            chars.clear()
            places.clear()
        chars.append(letter)
        places.append(place)
        for length in needles.lengths:
            if len(chars) >= length and "".join(chars[-length:]) in needles.whole:
                return places[-length]
    return None


def _held(needles: _Needles, kept: _Kept, length: int) -> int:
    """The least place from which the text could still become a needle; its length if there is none."""
    if not kept.places or length - kept.places[-1] > _GAP:
        return length
    for size in range(min(len(kept.text), needles.lengths[-1] - 1), 0, -1):
        if kept.text[-size:] in needles.begun:
            return kept.places[-size]
    return length


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
