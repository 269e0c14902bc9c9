"""Which score a wanted share of requests does not pass."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence

import numpy as np

# Requests of a rule that a router remembers the scores of, and from how many on they are used.
_RECENT, _ENOUGH = 1000, 100
# The least number of similar ones that are compared with, and how many are to be on the rarer side of a threshold.
_NEAREST, _BEYOND = 20, 2


class Recent:
    """Scores of the last requests of a rule, in this router alone."""

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def note(self, score: float) -> None:
        if len(self._order) == _RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._order.popleft())]
        self._order.append(score)
        bisect.insort(self._sorted, score)

    def threshold(self, share: float) -> float | None:
        """The score that `share` of them do not pass; None while there are too few."""
        count = len(self._sorted)
        if count < _ENOUGH:
            return None
        return self._sorted[round(share * count) - 1] if round(share * count) else -1.0


class Similar:
    """Scores of the last requests of a rule, and features of their prompts, in this router alone."""

    def __init__(self, width: int) -> None:
        """`width`: of the features."""
        self._looks = np.zeros((_RECENT, width))
        self._scores = np.zeros(_RECENT)
        self._count = 0

    def note(self, look: Sequence[float], score: float) -> None:
        place = self._count % _RECENT
        self._looks[place], self._scores[place] = look, score
        self._count += 1

    def threshold(self, look: Sequence[float], share: float) -> float | None:
        """The score that the next one of those that look like this does not pass with a probability of `share`, within
        (0, 1); None while there are too few. Features are measured by how much they vary."""
        count = min(self._count, _RECENT)
        if count < _ENOUGH:
            return None
        looks = self._looks[:count]
        spread = looks.std(0)
        distance = (((looks - np.asarray(look)) / np.where(spread > 0, spread, np.inf)) ** 2).sum(1)
        nearest = min(count, max(_NEAREST, math.ceil(_BEYOND / min(share, 1 - share))))
        ranked = np.sort(self._scores[:count][np.argpartition(distance, nearest - 1)[:nearest]])
        # Of n scores alike, the next one passes the j-th least with a probability of 1 - j / (n + 1).
        return float(np.interp(share * (nearest + 1) - 1, np.arange(nearest), ranked))


def quantile(quantiles: Sequence[float], share: float) -> float:
    """The value that `share` of those do not pass of which these are the evenly spaced quantiles; at least two."""
    place = share * (len(quantiles) - 1)
    below = min(int(place), len(quantiles) - 2)
    low, high = quantiles[below : below + 2]
    return low + (high - low) * (place - below)


def quantiles_of(scores: Sequence[float], count: int = 101) -> list[float]:
    """`count` evenly spaced quantiles of the scores, ends included; linear between neighbours."""
    ranked = sorted(scores)
    return [quantile(ranked, number / (count - 1)) for number in range(count)]
