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


def grams(text: str, layout: Layout) -> Grams:
    """The n-grams of a text, in time linear in it."""
    raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    low = np.minimum(raw, 0xFFFF)
    blank = _BLANK[low]
    keep = np.ones(len(raw), bool)
    keep[1:] = ~(blank[1:] & blank[:-1])
    places = np.flatnonzero(keep)
    codes = np.where(blank, _SPACE, raw)[places].astype(np.uint32)
    char_ends, char_lengths, char_hashes = _characters(codes, layout.chars)
    word_ends, word_lengths, word_hashes = _words(codes, _WORD[low[places]], layout.words)
    shift = 64 - layout.bits
    return Grams(
        codes,
        places,
        np.concatenate([char_ends, word_ends]),
        np.concatenate([char_lengths, word_lengths]),
        np.concatenate([char_hashes >> shift, (word_hashes >> shift) + (1 << layout.bits)]).astype(np.intp),
        len(char_ends),
    )


_Found = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.uint64]]


def _characters(codes: NDArray[np.uint32], longest: int) -> _Found:
    """Of two characters and more."""
    wide = codes.astype(np.uint64) + np.uint64(1)
    ends, lengths, hashes = [], [], []
    rolling = wide
    for length in range(2, longest + 1):
        rolling = rolling[:-1] * np.uint64(_PRIME) + wide[length - 1 :]
        if not len(rolling):
            break
        ends.append(np.arange(length - 1, len(codes)))
        lengths.append(np.full(len(rolling), length))
        hashes.append(_mixed(rolling + np.uint64(length)))
    return _joined(ends, lengths, hashes)


def _words(codes: NDArray[np.uint32], word: NDArray[np.bool_], longest: int) -> _Found:
    """A word is a run of letters and digits, or one other character that is no space."""
    if not len(codes):
        return _joined([], [], [])
    begins = (codes != _SPACE) & (~word | np.concatenate([[True], ~word[:-1]]))
    finishes = (codes != _SPACE) & (~word | np.concatenate([~word[1:], [True]]))
    starts, stops = np.flatnonzero(begins), np.flatnonzero(finishes)
    # The hash of any range is a difference of running sums, moved back to the start.
    power = np.cumprod(np.full(len(codes), _PRIME, np.uint64))
    back = np.cumprod(np.full(len(codes), _INVERSE, np.uint64))
    running = np.concatenate([[np.uint64(0)], np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * power)])
    single = _mixed((running[stops + 1] - running[starts]) * back[starts])
    ends, lengths, hashes = [], [], []
    combined = single
    for count in range(1, longest + 1):
        if count > 1:
            combined = _mixed(combined[:-1] * np.uint64(_PRIME) + single[count - 1 :])
        if not len(combined):
            break
        ends.append(stops[count - 1 :])
        lengths.append(stops[count - 1 :] - starts[: len(combined)] + 1)
        hashes.append(combined)
    return _joined(ends, lengths, hashes)


def _joined(ends: list[NDArray[np.intp]], lengths: list[NDArray[np.intp]], hashes: list[NDArray[np.uint64]]) -> _Found:
    if not ends:
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0, np.uint64)
    return np.concatenate(ends), np.concatenate(lengths), np.concatenate(hashes)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: all bits of the input reach the high bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
