"""Exact and near duplicates across splits: found by shingles, and taken out of what is learned from.

The test splits stay as they are: what a test row resembles leaves the training rows, and the validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshlm.guard.ngrams import Layout, grams
from meshlm.guard.normalize import readings
from meshlm.guard.training.examples import Example

# Jaccard index of two texts' character shingles from which they are near duplicates.
_NEAR = 0.7
_SHINGLE = 5  # characters
_BANDS, _ROWS = 16, 4  # of min-hashes: a pair at 0.7 is missed once in 80
_ORDER = {"test": 0, "validation": 1, "train": 2}
_LAYOUT = Layout(chars=_SHINGLE, words=0, bits=32)
_SEEDS = np.random.default_rng(20261126)
_FACTORS = _SEEDS.integers(1, 1 << 62, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _SEEDS.integers(0, 1 << 62, _BANDS * _ROWS, dtype=np.uint64)


@dataclass
class Sieve:
    """Keeps what it has not seen the like of."""

    exact: int = 0
    near: int = 0

    def __post_init__(self) -> None:
        self._seen: set[str] = set()
        self._bands: dict[tuple[int, bytes], list[NDArray[np.intp]]] = {}

    def fresh(self, text: str) -> bool:
        """Whether the text is new; if so, it is remembered."""
        key = _key(text)
        if key in self._seen:
            self.exact += 1
            return False
        shingles = _shingles(key)
        bands = _min_hashes(shingles)
        for band in bands:
            if any(_jaccard(shingles, other) >= _NEAR for other in self._bands.get(band, ())):
                self.near += 1
                return False
        self._seen.add(key)
        for band in bands:
            self._bands.setdefault(band, []).append(shingles)
        return True


def without_duplicates(examples: Sequence[Example]) -> tuple[list[Example], Sieve]:
    """The examples that are new, in order of splits: test, validation, train. And how many were not."""
    sieve = Sieve()
    ordered = sorted(examples, key=lambda example: _ORDER[example.split])
    return [example for example in ordered if sieve.fresh(example.text)], sieve


def _key(text: str) -> str:
    """What two texts share that differ in case, marks, blanks or punctuation."""
    plain = next(iter(readings(text))).text
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split()) or text


def _shingles(key: str) -> NDArray[np.intp]:
    found = grams(key, _LAYOUT)
    chosen = found.buckets[found.lengths == _SHINGLE]
    return np.unique(chosen if len(chosen) else found.buckets)


def _min_hashes(shingles: NDArray[np.intp]) -> list[tuple[int, bytes]]:
    if not len(shingles):
        return []
    hashed = shingles.astype(np.uint64)[None, :] * _FACTORS[:, None] + _OFFSETS[:, None]
    least = hashed.min(axis=1).reshape(_BANDS, _ROWS)
    return [(band, least[band].tobytes()) for band in range(_BANDS)]


def _jaccard(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)
