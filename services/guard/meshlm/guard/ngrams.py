"""Texts as n-grams of characters and words, hashed into buckets: what the embedded model reads.

Everything is computed for a whole text at once, each n-gram by where it ends, so that sums over any range of a text
are differences of one running sum. Training and serving share this module: a change here is a new artefact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Raised when the same text would fall into other buckets.
VERSION = 1

_PRIME = 0x9E3779B1  # odd: it has an inverse modulo 2**64
_INVERSE = pow(_PRIME, -1, 1 << 64)
_SPACE = 32
_NONE = np.zeros(0, np.intp)
# Whether a character is part of a word, below 0x10000; whatever lies above counts as one.
_WORD = np.array([chr(code).isalnum() for code in range(0x10000)])
_BLANK = np.array([chr(code).isspace() for code in range(0x10000)])


@dataclass(frozen=True)
class Layout:
    """Which n-grams there are, and into how many buckets they fall."""

    chars: int = 5  # longest run of characters
    words: int = 2  # longest run of words
    bits: int = 18  # 2**bits buckets for characters, and as many for words

    @property
    def buckets(self) -> int:
        """Of characters, then of words."""
        return 2 << self.bits


@dataclass(frozen=True)
class Grams:
    """The n-grams of a text. `ends`, `lengths`: the last character of each, and how many it has, in `codes`."""

    # Code points of the text, with each run of blanks as one space; and where each stood in the text.
    codes: NDArray[np.uint32]
    places: NDArray[np.intp]
    # Character n-grams first, then word n-grams; within an order ascending.
    ends: NDArray[np.intp]
    lengths: NDArray[np.intp]
    buckets: NDArray[np.intp]
    # How many of them are of characters.
    of_chars: int

    def spelled(self, index: int) -> str:
        """The n-gram itself."""
        end = int(self.ends[index]) + 1
        return "".join(map(chr, self.codes[end - int(self.lengths[index]) : end]))


@dataclass(frozen=True)
class Codes:
    """A text as code points, each run of blanks as one space."""

    codes: NDArray[np.uint32]
    # Of each character of the text, which code it became or is a part of.
    index: NDArray[np.intp]
    # Of each code, where it stood in the text; and whether it may be a part of a word.
    places: NDArray[np.intp]
    word: NDArray[np.bool_]

    @classmethod
    def of(cls, text: str) -> Codes:
        raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        low = np.minimum(raw, 0xFFFF)
        blank = _BLANK[low]
        keep = np.ones(len(raw), bool)
        keep[1:] = ~(blank[1:] & blank[:-1])
        places = np.flatnonzero(keep)
        codes = np.where(blank, _SPACE, raw)[places].astype(np.uint32)
        return cls(codes, np.cumsum(keep) - 1, places, _WORD[low[places]])

    def words(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """First and last code of each: a run of letters and digits, or one other character that is no space."""
        if not len(self.codes):
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        apart, shown = ~self.word, self.codes != _SPACE
        begins = shown & (apart | np.concatenate([[True], apart[:-1]]))
        finishes = shown & (apart | np.concatenate([apart[1:], [True]]))
        return np.flatnonzero(begins), np.flatnonzero(finishes)


def grams(text: str, layout: Layout) -> Grams:
    """The n-grams of a text, in time linear in it."""
    read = Codes.of(text)
    of_chars = characters(read.codes, layout.chars)
    char_ends = [np.arange(length - 1, len(read.codes)) for length, _ in of_chars]
    char_lengths = [np.full(len(hashes), length) for length, hashes in of_chars]
    starts, stops = read.words()
    of_words = words(ranges(read.codes, starts, stops), layout.words)
    word_ends = [stops[count - 1 :] for count, _ in of_words]
    word_lengths = [stops[count - 1 :] - starts[: len(hashes)] + 1 for count, hashes in of_words]
    return Grams(
        read.codes,
        read.places,
        np.concatenate([*char_ends, *word_ends, _NONE]),
        np.concatenate([*char_lengths, *word_lengths, _NONE]),
        np.concatenate([*buckets(of_chars, layout), *buckets(of_words, layout, of_words=True), _NONE]),
        sum(map(len, char_ends)),
    )


# How many characters or words, and a hash of each n-gram of so many, in the order of the text.
_Hashed = list[tuple[int, NDArray[np.uint64]]]


def characters(codes: NDArray[np.uint32], longest: int) -> _Hashed:
    """N-grams of two characters and more; of n, that which begins at a code is at its place."""
    wide = codes.astype(np.uint64) + np.uint64(1)
    found = []
    rolling = wide
    for length in range(2, min(longest, len(codes)) + 1):
        rolling = rolling[:-1] * np.uint64(_PRIME) + wide[length - 1 :]
        found.append((length, _mixed(rolling + np.uint64(length))))
    return found


def ranges(codes: NDArray[np.uint32], starts: NDArray[np.intp], stops: NDArray[np.intp]) -> NDArray[np.uint64]:
    """A hash of the codes from each start to its stop (inclusive): a difference of running sums, moved back."""
    power = np.cumprod(np.full(len(codes), _PRIME, np.uint64))
    back = np.cumprod(np.full(len(codes), _INVERSE, np.uint64))
    running = np.concatenate([[np.uint64(0)], np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * power)])
    return _mixed((running[stops + 1] - running[starts]) * back[starts])


def words(single: NDArray[np.uint64], longest: int) -> _Hashed:
    """N-grams of one word and more, of the hashes of words."""
    found = []
    combined = single
    for count in range(1, min(longest, len(single)) + 1):
        if count > 1:
            combined = _mixed(combined[:-1] * np.uint64(_PRIME) + single[count - 1 :])
        found.append((count, combined))
    return found


def buckets(hashed: _Hashed, layout: Layout, *, of_words: bool = False) -> list[NDArray[np.intp]]:
    """Where n-grams fall."""
    first = np.uint64(int(of_words) << layout.bits)
    return [((hashes >> np.uint64(64 - layout.bits)) + first).astype(np.intp) for _, hashes in hashed]


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: all bits of the input reach the high bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
