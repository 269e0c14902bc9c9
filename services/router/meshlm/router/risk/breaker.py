"""A breaker on bursts of attacks: one caller's, in this process. `standing_script.py` is the same for all routers.

Consecutive failures, which breakers usually count, say nothing here: an attacker sends harmless requests between. So
it trips where, of the last minute's requests, at least 5 were flagged and their share is surely (lower end of Wilson's
95% interval) above what is ordinary, or where the sum of (flagged - 2 x ordinary), never below 0, passes 4.

What is ordinary is learned: twice the caller's share of flagged requests over the last days, within bounds. A minute
that ends in a trip is no part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from meshlm.router.risk.config import BreakerConfig

# Milliseconds. The window is six buckets, and moves by one of them.
BUCKET = 10_000
BUCKETS = 6
# The caller's share of flagged requests is remembered by half for so long.
MEMORY = 86_400_000
# Requests that a caller must have made for half of its own share to count.
FEW = 100
LEAST_FLAGGED = 5
LEAST_SHARE = 0.1
# How many times the ordinary share is a burst.
TIMES = 3
CUSUM_LIMIT = 4.0
# Two-sided 95% of a normal distribution.
_Z = 1.959964
PROBES = 3
# While all probes are under way, callers are told to come back in so many milliseconds.
PROBE_WAIT = 1_000


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass
class Look:
    """What a breaker says to a request that is about to start."""

    state: State
    passes: bool = True
    wait: float = 0  # milliseconds, where it does not pass


@dataclass
class Breaker:
    """All times are milliseconds of the caller's clock; `jitter` is in [0.8, 1.2]."""

    config: BreakerConfig
    state: State = State.CLOSED
    until: float = 0  # while open
    trips: int = 0  # in a row, after the first
    closed_at: float | None = None  # after the last trip
    cusum: float = 0
    flagged: float = 0  # long ago, fading
    total: float = 0
    faded_at: float = 0
    buckets: dict[int, tuple[int, int]] = field(default_factory=dict)  # flagged and all, by number
    probes: dict[str, float] = field(default_factory=dict)  # when each gives up its place
    clean: int = 0  # probes that were

    def look(self, identifier: str, now: float) -> Look:
        """Before a request starts."""
        self._advance(now)
        if self.state is State.OPEN:
            return Look(self.state, False, self.until - now)
        if self.state is State.HALF_OPEN:
            self.probes = {name: ends for name, ends in self.probes.items() if ends > now}
            if identifier not in self.probes:
                if len(self.probes) + self.clean >= PROBES:
                    return Look(self.state, False, PROBE_WAIT)
                self.probes[identifier] = now + self.config.probe_seconds * 1000
        return Look(self.state)

    def note(self, identifier: str, flagged: bool | None, now: float, jitter: float) -> bool:
        """After a request ended; None: nothing is known of it. Returns whether the breaker opened."""
        self._advance(now)
        if self.state is State.HALF_OPEN:
            return self._note_probe(identifier, flagged, now, jitter)
        if self.state is State.OPEN or flagged is None:
            return False
        number = int(now // BUCKET)
        bad, all_ = self.buckets.get(number, (0, 0))
        self.buckets[number] = bad + flagged, all_ + 1
        self.cusum = max(0.0, self.cusum + flagged - 2 * self.baseline(now))
        if not self._bursts(now):
            return False
        recent = self.closed_at is not None and now - self.closed_at < self.config.longest_seconds * 1000
        self._trip(self.trips + 1 if recent else 0, now, jitter)
        return True

    def baseline(self, now: float) -> float:
        """The share of flagged requests that is ordinary of this caller."""
        fades = 0.5 ** ((now - self.faded_at) / MEMORY)
        usual = 2 * self.flagged * fades / (self.total * fades + FEW)
        return float(min(max(usual, self.config.baseline), self.config.highest_baseline))

    def _advance(self, now: float) -> None:
        if self.state is State.OPEN and now >= self.until:
            self.state, self.probes, self.clean = State.HALF_OPEN, {}, 0
        oldest = int(now // BUCKET) - BUCKETS + 1
        past = sorted(number for number in self.buckets if number < oldest)
        if past:
            fades = 0.5 ** ((now - self.faded_at) / MEMORY)
            self.flagged, self.total, self.faded_at = self.flagged * fades, self.total * fades, now
        for number in past:
            flagged, total = self.buckets.pop(number)
            fades = 0.5 ** ((now - number * BUCKET) / MEMORY)  # it may be long past when somebody comes by
            self.flagged, self.total = self.flagged + flagged * fades, self.total + total * fades

    def _bursts(self, now: float) -> bool:
        flagged = sum(bad for bad, _ in self.buckets.values())
        total = sum(all_ for _, all_ in self.buckets.values())
        share = max(LEAST_SHARE, TIMES * self.baseline(now))
        return (flagged >= LEAST_FLAGGED and wilson(flagged, total) > share) or self.cusum > CUSUM_LIMIT

    def _note_probe(self, identifier: str, flagged: bool | None, now: float, jitter: float) -> bool:
        if self.probes.pop(identifier, None) is None or flagged is None:
            return False
        if flagged:
            self._trip(self.trips + 1, now, jitter)
            return True
        self.clean += 1
        if self.clean >= PROBES:
            self.state, self.closed_at, self.probes, self.clean = State.CLOSED, now, {}, 0
        return False

    def _trip(self, trips: int, now: float, jitter: float) -> None:
        config = self.config
        seconds = min(config.open_seconds * 2.0 ** min(trips, 32), config.longest_seconds)
        self.state, self.trips, self.until = State.OPEN, trips, now + math.floor(seconds * 1000 * jitter)
        self.buckets, self.cusum, self.probes, self.clean = {}, 0, {}, 0


def wilson(hits: int, total: int) -> float:
    """Lower end of Wilson's 95% interval for a share."""
    if not total:
        return 0.0
    share, z2 = hits / total, _Z * _Z
    middle = share + z2 / (2 * total)
    return (middle - _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))) / (1 + z2 / total)
