"""Exact and near duplicates across splits: found by shingles, and taken out of what is learned from.

The test splits stay as they are: what a test row resembles leaves the training rows, and the validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meshlm.guard.ngrams import Layout, grams
from meshlm.guard.normalize import readings
from meshlm.guard.training.examples import Example

# Jaccard index of two texts' character shingles from which they are near duplicates.
_NEAR = 0.7
_SHINGLE = 5  # characters
_BANDS, _ROWS = 16, 4  # of min-hashes: a pair at 0.7 is missed once in 80
_ORDER = {"test": 0, "held-out": 1, "validation": 2, "train": 3}
_LAYOUT = Layout(chars=_SHINGLE, words=0, bits=32)
_SEEDS = np.random.default_rng(20261126)
_FACTORS = _SEEDS.integers(1, 1 << 62, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _SEEDS.integers(0, 1 << 62, _BANDS * _ROWS, dtype=np.uint64)


@dataclass
class Sieve:
    """Keeps what it has not seen the like of."""

    exact: int = 0
    near: int = 0
    # Texts that resemble one that must not be learned from.
    barred: int = 0

    def __post_init__(self) -> None:
        self._seen: set[str] = set()
        self._bands: dict[tuple[int, bytes], list[NDArray[np.intp]]] = {}

    def fresh(self, text: str) -> bool:
        """Whether the text is new; if so, it is remembered."""
        return self.admits(Trace(text))

    def knows(self, text: str) -> bool:
        """Whether it remembers a text like this one."""
        return self.holds(Trace(text))

    def admits(self, trace: Trace) -> bool:
        """`fresh`, of a text by its trace."""
        if trace.key in self._seen:
            self.exact += 1
            return False
        if self._near(trace):
            self.near += 1
            return False
        self._seen.add(trace.key)
        for band in trace.bands:
            self._bands.setdefault(band, []).append(trace.shingles)
        return True

    def holds(self, trace: Trace) -> bool:
        """`knows`, of a text by its trace."""
        return trace.key in self._seen or self._near(trace)

    def _near(self, trace: Trace) -> bool:
        return any(
            _jaccard(trace.shingles, other) >= _NEAR for band in trace.bands for other in self._bands.get(band, ())
        )


class Trace:
    """What is compared of a text; computed once, and only as far as it is needed."""

    def __init__(self, text: str) -> None:
        self.key = _key(text)

    @cached_property
    def shingles(self) -> NDArray[np.intp]:
        found = grams(self.key, _LAYOUT)
        chosen = found.buckets[found.lengths == _SHINGLE]
        return np.unique(chosen if len(chosen) else found.buckets)

    @cached_property
    def bands(self) -> list[tuple[int, bytes]]:
        """Min-hashes of the shingles, some at a time."""
        if not len(self.shingles):
            return []
        hashed = self.shingles.astype(np.uint64)[None, :] * _FACTORS[:, None] + _OFFSETS[:, None]
        least = hashed.min(axis=1).reshape(_BANDS, _ROWS)
        return [(band, least[band].tobytes()) for band in range(_BANDS)]


def without_duplicates(examples: Sequence[Example], barred: Sieve | None = None) -> tuple[list[Example], Sieve]:
    """The examples that are new, in order of splits: test, held-out, validation, train. And how many were not.

    `barred`: knows what no example may resemble, in any split.
    """
    sieve = Sieve()
    kept = []
    for example in sorted(examples, key=lambda example: _ORDER[example.split]):
        trace = Trace(example.text)
        if barred is not None and barred.holds(trace):
            sieve.barred += 1
        elif sieve.admits(trace):
            kept.append(example)
    return kept, sieve


def _key(text: str) -> str:
    """What two texts share that differ in case, marks, blanks or punctuation."""
    plain = next(iter(readings(text))).text
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split()) or text


def _jaccard(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)
