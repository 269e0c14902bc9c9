"""The n-grams of a text's windows: windows overlap, and what is in two of them is hashed once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshlm.guard import ngrams
from meshlm.guard.ngrams import Codes, Layout

# Windows that are hashed together: enough to pay for the calls, and few enough for the processor's caches.
_TOGETHER = 16
Buckets = NDArray[np.intp]


def windowed(text: str, spans: Sequence[tuple[int, int]], layout: Layout) -> Iterator[tuple[Buckets, int]]:
    """Of each span the buckets of its n-grams, those of characters first, and how many of them are of characters.

    They are what `ngrams.grams` finds in the stretch by itself, in any order. `spans`: starts and ends ascend.
    """
    for some in _stretches(spans):
        begin, end = some[0][0], some[-1][1]
        if end == begin:
            yield np.zeros(0, np.intp), 0
        else:
            yield from _Stretch.of(text[begin:end], [(a - begin, b - begin) for a, b in some], layout).windows()


def _stretches(spans: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Neighbours that overlap, up to so many."""
    first = 0
    for index in range(1, len(spans) + 1):
        if index == len(spans) or index - first == _TOGETHER or spans[index][0] >= spans[index - 1][1]:
            yield spans[first:index]
            first = index


@dataclass(frozen=True)
class _Stretch:
    """A few windows, hashed."""

    # Of each window, its first code, and that behind its last.
    edges: list[tuple[int, int]]
    # Of each length from two on, where the n-gram of so many characters falls that begins at a code.
    chars: list[Buckets]
    # Of each window, its words' places among the words of all windows, one window after the other.
    places: list[tuple[int, int]]
    # Of each length from one on, where the n-gram falls that begins with a word.
    words: list[Buckets]

    @classmethod
    def of(cls, text: str, spans: Sequence[tuple[int, int]], layout: Layout) -> _Stretch:
        read = Codes.of(text)
        lows = read.index[[start for start, _ in spans]]
        highs = read.index[[end - 1 for _, end in spans]] + 1
        starts, stops = read.words()
        # A window may cut its first word and its last: what is left of them is a word of its own.
        firsts, lasts = np.searchsorted(stops, lows), np.searchsorted(starts, highs)
        counts = lasts - firsts
        behind = np.cumsum(counts)
        taken = np.arange(int(behind[-1])) + np.repeat(firsts - (behind - counts), counts)
        cut_starts = np.maximum(starts[taken], np.repeat(lows, counts))
        cut_stops = np.minimum(stops[taken], np.repeat(highs - 1, counts))
        single = ngrams.ranges(read.codes, cut_starts, cut_stops)
        return cls(
            list(zip(lows.tolist(), highs.tolist(), strict=True)),
            ngrams.buckets(ngrams.characters(read.codes, layout.chars), layout),
            list(itertools.pairwise([0, *behind.tolist()])),
            ngrams.buckets(ngrams.words(single, layout.words), layout, of_words=True),
        )

    def windows(self) -> Iterator[tuple[Buckets, int]]:
        for (low, high), (first, last) in zip(self.edges, self.places, strict=True):
            chars = [of[low : max(low, high - length + 1)] for length, of in enumerate(self.chars, 2)]
            words = [of[first : max(first, last - count + 1)] for count, of in enumerate(self.words, 1)]
            yield np.concatenate([*chars, *words, np.zeros(0, np.intp)]), sum(map(len, chars))


class Distinct(threading.local):
    """Tells repeated buckets from first ones without sorting: a table has, of each bucket, who came there last.

    What the table had before does not matter, so it is never cleared; each thread has its own.
    """

    def __init__(self, layout: Layout) -> None:
        self._last = np.empty(layout.buckets, np.int32)

    def __call__(self, buckets: Buckets) -> NDArray[np.bool_]:
        """True at one place of each distinct bucket."""
        order = np.arange(len(buckets), dtype=np.int32)
        self._last[buckets] = order
        return np.asarray(self._last[buckets] == order)
