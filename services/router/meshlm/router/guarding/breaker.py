"""Not waiting again and again for a peer that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after some failures in a row; then lets one caller through at a time, at most every so many seconds, until
    one of them succeeds. For one process and one peer: whether it is reachable from here is nobody else's matter."""

    def __init__(self, failures: int, retry_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`failures` in a row open it; 0: it never opens."""
        self._failures = failures
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._count = 0
        self._next_try = 0.0

    @property
    def open(self) -> bool:
        """Whether calls are not made but now and then."""
        return bool(self._failures) and self._count >= self._failures

    def allows(self) -> bool:
        """Whether to make a call now. Whoever is told so says how it went."""
        if not self.open:
            return True
        now = self._clock()
        if now < self._next_try:
            return False
        self._next_try = now + self._retry_seconds
        return True

    def succeed(self) -> None:
        """A call was answered."""
        self._count = 0

    def fail(self) -> None:
        """A call was not answered."""
        self._count += 1
        self._next_try = self._clock() + self._retry_seconds
