"""How many attempts at another replica a router may make, so that retries never become the load that causes them."""

from __future__ import annotations

import time
from collections.abc import Callable

from meshlm.chassis.telemetry import Name, meter

_SAVED_SECONDS = 10.0  # unused retries are kept that long, so that the loss of one worker is covered


class RetryBudget:
    """A token bucket that requests and time fill (Finagle's retry budget). One a router process."""

    def __init__(self, share: float, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`share`: retries that each request allows; `per_second`: those that time allows."""
        self._share = share
        self._per_second = per_second
        self._most = per_second * _SAVED_SECONDS + 1.0  # a share alone must be able to grow to one retry
        self._clock = clock
        self._left = per_second * _SAVED_SECONDS
        self._filled = clock()
        self._counter = meter().create_counter(
            Name.ROUTER_RETRIES, "{retry}", "Attempts at another replica before the first token, made or not afforded"
        )

    def note_request(self) -> None:
        """A request came."""
        self._left = min(self._most, self._left + self._share)

    def take(self, why: str) -> bool:
        """Whether a retry may be made now. `why` labels the metric: `refused`, `lost` or `hedge`."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._filled) * self._per_second)
        self._filled = now
        made = self._left > 1.0 - 1e-9  # ten tenths are one
        if made:
            self._left -= 1.0
        self._counter.add(1, {"why": why, "made": made})
        return made
