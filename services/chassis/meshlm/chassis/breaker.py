"""Not waiting again and again for a peer that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after some failures in a row; then lets one caller try at a time, after a while, until one succeeds.

    For one process and one peer: whether it is reachable from here is nobody else's matter. It counts what its owner
    tells it, and waits for nothing.
    """

    def __init__(
        self, failures: int, seconds: float, *, doublings: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`failures` in a row open it, 0: it never opens; for `seconds`, doubled after each try in vain, up to so many
        times."""
        self._failures = failures
        self._seconds = seconds
        self._doublings = doublings
        self._clock = clock
        self._failed = 0
        self._openings = 0
        self._until = 0.0  # while it is open: when somebody may try; seconds of the clock
        self._trying = False

    @property
    def open(self) -> bool:
        """Whether calls are not made but now and then."""
        return self._openings > 0

    def admits(self) -> bool:
        """Whether a call may be made now."""
        return not self.open or self._clock() >= self._until

    def begin(self) -> None:
        """An admitted call begins: of an open breaker, the one that tries. `succeed`, `fail` or `leave` follows; if
        none does, another may try after as long a time again."""
        if self.open:
            self._trying = True
            self._until = self._clock() + self._wait(self._openings - 1)

    def allows(self) -> bool:
        """`admits`, and then `begin`."""
        if not self.admits():
            return False
        self.begin()
        return True

    def succeed(self) -> None:
        """A call was answered."""
        self._failed = self._openings = 0
        self._trying = False

    def fail(self) -> None:
        """A call was not answered. Of an open breaker only the one that tries tells anything new."""
        self._failed += 1
        if self._trying or (not self.open and 0 < self._failures <= self._failed):
            self._until = self._clock() + self._wait(self._openings)
            self._openings += 1
            self._trying = False

    def leave(self) -> None:
        """A call ended without telling anything of the peer, e.g. it was cancelled: another may try at once."""
        if self._trying:
            self._trying = False
            self._until = self._clock()

    def _wait(self, openings: int) -> float:
        return float(self._seconds * 2 ** min(openings, self._doublings))
