"""A breaker for one peer: after failures in a row it is left alone, then tried once, then trusted again."""

from __future__ import annotations

import time
from collections.abc import Callable

# Longest time that a peer is left alone, in multiples of the first.
_MOST_DOUBLINGS = 3


class Breaker:
    """Counts what its owner tells it; waits for nothing."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens after `failures` in a row, for `seconds`, which double each time in a row."""
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failed = 0
        self._openings = 0
        self._until: float | None = None  # set while it is open; seconds of the clock
        self._trying = False

    @property
    def open(self) -> bool:
        return self._until is not None

    def admits(self) -> bool:
        """Whether a call may be made now."""
        if self._until is None:
            return True
        return not self._trying and self._clock() >= self._until

    def begin(self) -> None:
        """An admitted call begins: of an open breaker, the one that tries. `succeed`, `fail` or `leave` follows."""
        self._trying = self._until is not None

    def succeed(self) -> None:
        self._failed = self._openings = 0
        self._until, self._trying = None, False

    def fail(self) -> None:
        self._failed += 1
        if self._trying or (self._until is None and self._failed >= self._limit):
            self._until = self._clock() + self._seconds * 2 ** min(self._openings, _MOST_DOUBLINGS)
            self._openings += 1
            self._trying = False

    def leave(self) -> None:
        """The call ended without telling anything of the peer, e.g. it was cancelled."""
        self._trying = False
