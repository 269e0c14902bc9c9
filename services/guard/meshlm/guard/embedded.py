"""The embedded model: how likely a text is a prompt attack, and how likely it asks for or holds something harmful.

Two linear heads on hashed n-grams, trained by `meshlm.guard.train`, calibrated so that of texts scored 0.5 half are
what the score says, on data like its own. It knows what words go with what intent, in English mostly. It does not
follow an argument, know what is true, or see an attack that is spread over turns. Figures: docs/guard-data.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshlm.guard import artefact
from meshlm.guard.encodings import unwrap
from meshlm.guard.judging import Head
from meshlm.guard.ngram_windows import Distinct, windowed
from meshlm.guard.ngrams import Grams, grams
from meshlm.guard.normalize import readings
from meshlm.guard.windows import spans

_HEADS: tuple[Head, ...] = ("attack", "harm")
# Log-odds from which a category is named; the likeliest is, whatever its own.
_NAMED = 0.0
_MOST_CATEGORIES = 3


@dataclass(frozen=True)
class Scored:
    """The window of a text that scores highest for a head."""

    # Calibrated probability. Range [0, 1].
    score: float
    # Characters of the original text: start inclusive, end exclusive.
    start: int
    end: int
    # The reading of the window that scored so, and what it is a reading of: `plain`, `leet`, `base64`, ...
    text: str
    form: str


@dataclass(frozen=True)
class _Form:
    """One reading, and the way back."""

    name: str
    text: str
    span: Callable[[int, int], tuple[int, int]]


class EmbeddedModel:
    """A loaded artefact. Reentrant: judging changes nothing."""

    def __init__(self, loaded: artefact.Artefact) -> None:
        self.version = loaded.version
        self.card = loaded.card
        self._layout = loaded.layout
        self._distinct = Distinct(loaded.layout)
        self._weights: dict[Head, NDArray[np.int8]] = {"attack": loaded.attack, "harm": loaded.harm}
        self._numbers: dict[Head, dict[str, float]] = loaded.card["heads"]
        self._names: list[str] = loaded.card["categories"]
        self._category_weights = loaded.categories
        self._category_shift = int(loaded.card["category_shift"])
        self._category_scale: list[float] = loaded.card["category_scale"]
        self._category_intercept: list[float] = loaded.card["category_intercept"]

    @classmethod
    def load(cls, path: str | Path | None = None) -> EmbeddedModel:
        """The model of a file, or the one that the guard ships. Raises ArtefactError."""
        return cls(artefact.load(path))

    def judge(self, text: str, heads: tuple[Head, ...] = _HEADS) -> dict[Head, Scored]:
        """For each head, the window that scores highest: of any reading of the text, or of what is wrapped in it."""
        best: dict[Head, Scored] = {}
        known: set[str] = set()
        for form in _forms(text):
            # Most windows of a reading are those of the plain one; a text may repeat itself.
            cut = [at for at in spans(len(form.text)) if not _seen(form.text[slice(*at)], known)]
            for (start, end), score_of in zip(cut, self._windows(form.text, cut), strict=True):
                for head in heads:
                    score = score_of(head)
                    if head not in best or score > best[head].score:
                        span = form.span(start, end) if end else (0, 0)
                        best[head] = Scored(score, *span, form.text[start:end], form.name)
        return best

    def score(self, text: str, head: Head) -> float:
        """One window of one reading, as it is: for texts that are judged as they grow. Range [0, 1]."""
        reading = next(iter(readings(text))).text
        (score_of,) = self._windows(reading, [(0, len(reading))])
        return score_of(head)

    def categories(self, text: str) -> tuple[str, ...]:
        """What a harmful text is about, S1 to S14: the likeliest first, at least one."""
        reduced = np.unique(grams(text, self._layout).buckets >> self._category_shift)
        if not len(reduced):
            return (self._names[0],)
        sums = self._category_weights[:, reduced].sum(axis=1, dtype=np.int64) / math.sqrt(len(reduced))
        margins = sums * np.array(self._category_scale) + np.array(self._category_intercept)
        order = [int(index) for index in np.argsort(-margins, kind="stable")[:_MOST_CATEGORIES]]
        return tuple(self._names[i] for rank, i in enumerate(order) if rank == 0 or margins[i] >= _NAMED)

    def explain(self, text: str, head: Head, most: int = 10) -> list[tuple[str, float]]:
        """The n-grams of a window that moved its log-odds most, up or down, and by how much."""
        found = grams(text, self._layout)
        _, firsts = np.unique(found.buckets, return_index=True)
        parts = self._parts(head, found, firsts)
        order = np.argsort(-np.abs(parts), kind="stable")[:most]
        return [(found.spelled(int(firsts[i])), float(parts[i])) for i in order if parts[i] != 0]

    def _parts(self, head: Head, found: Grams, firsts: NDArray[np.intp]) -> NDArray[np.float64]:
        """What each distinct n-gram adds to the log-odds."""
        of_words = found.buckets[firsts] >= 1 << self._layout.bits
        counts = np.where(of_words, of_words.sum(), (~of_words).sum())
        numbers = self._numbers[head]
        factor = numbers["scale"] * numbers["slope"]
        return np.asarray(self._weights[head][found.buckets[firsts]] * factor / np.sqrt(np.maximum(counts, 1)))

    def _windows(self, text: str, cut: Sequence[tuple[int, int]]) -> Iterator[Callable[[Head], float]]:
        """For each window, what gives its probability."""
        for buckets, of_chars in windowed(text, cut, self._layout):
            first = self._distinct(buckets)
            chars, words = buckets[:of_chars][first[:of_chars]], buckets[of_chars:][first[of_chars:]]
            yield partial(self._probability, chars, words)

    def _probability(self, chars: NDArray[np.intp], words: NDArray[np.intp], head: Head) -> float:
        """Of the distinct buckets of a window."""
        weights, numbers = self._weights[head], self._numbers[head]
        margin = numbers["intercept"]
        for part in (chars, words):
            if len(part):
                margin += numbers["scale"] * int(weights[part].sum(dtype=np.int64)) / math.sqrt(len(part))
        log_odds = numbers["slope"] * margin + numbers["offset"]
        return 1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, log_odds))))


def _seen(window: str, known: set[str]) -> bool:
    """Whether it is known; it is from now on."""
    if window in known:
        return True
    known.add(window)
    return False


def _forms(text: str) -> Iterator[_Form]:
    """What the text may be read as, each form once."""
    seen: set[str] = set()
    for reading in readings(text):
        if reading.text not in seen:
            seen.add(reading.text)
            yield _Form(reading.form, reading.text, reading.span)
    for carrier in unwrap(text):
        for reading in readings(carrier.text):
            if reading.text not in seen:
                seen.add(reading.text)
                yield _Form(carrier.form, reading.text, carrier.span)
