"""How many requests a worker can have at a time: a limit that follows what it does to their latency.

After Netflix's Gradient2 (concurrency-limits): a short mean of latency against a long one. Whole requests cannot be
compared, for they are as long as their answers; so latency here is the time to the first token for each prompt token
that was computed, and the time for each token after it, whichever got worse. A larger batch makes each token slower and
the whole faster: so the limit shrinks only while a queue stands at the worker, and never for the batch alone.

What is learnt is what the worker can have from all routers: each uses its part by their number, so that N routers
which know nothing yet do not send N times as much as one would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshlm.router.replicas.overload_config import OverloadConfig

# Samples of a step of the limit, and least seconds between two.
_STEP_SAMPLES = 8
_STEP_SECONDS = 0.1
_LONG_SAMPLES = 600
# So much longer than usual is no sign of a queue.
_TOLERANCE = 1.5
_SMOOTHING = 0.2
# Gradient of a worker that was never seen without a queue.
_UNKNOWN = 0.9
# How much of what is seen while a queue stands counts as usual: little, for it may be the new usual.
_QUEUED_SHARE = 0.1
# Places that a limit grows by, times the smoothing, while nothing got worse.
_GROWTH = 4
_DROP = 0.9


@dataclass
class Signal:
    """One kind of latency: the mean of the samples since the last step, and the long mean."""

    samples: list[float] = field(default_factory=list)
    long: float = 0.0
    seen: int = 0

    def note(self, seconds: float) -> None:
        self.samples.append(seconds)

    def gradient(self, *, queued: bool) -> float:
        """How the latest samples compare, in [0.5, 1]: 1 is as good as usual. Takes them.

        What is usual is learnt while no queue stands: one that always stood would else be the measure of itself.
        """
        samples, self.samples = self.samples, []
        if not samples:
            return 1.0
        short = sum(samples) / len(samples)
        if queued and not self.seen:
            return _UNKNOWN
        if not queued:
            self.seen += len(samples)
        share = max(2 / (_LONG_SAMPLES + 1) * len(samples), len(samples) / self.seen)
        self.long += min(1.0, share) * (_QUEUED_SHARE if queued else 1.0) * (short - self.long)
        if self.long > 2 * short:  # after a long overload: forget it sooner
            self.long *= 0.95
        return max(0.5, min(1.0, _TOLERANCE * self.long / short)) if short > 0 else 1.0


class ConcurrencyLimit:
    """For one worker, in one of the routers that watch it."""

    def __init__(self, config: OverloadConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._whole = float(config.first_concurrency)  # of all routers, if each has as much
        self._routers = 1
        self._first = Signal()
        self._each = Signal()
        self._stepped = clock()

    @property
    def value(self) -> int:
        return int(self._share)

    def divide(self, routers: int) -> None:
        """So many routers watch the worker now."""
        self._routers = max(1, routers)

    @property
    def _share(self) -> float:
        return self._bounded(self._whole / self._routers)

    def note_first(self, seconds: float) -> None:
        """Time to a first token, for each prompt token that was computed."""
        self._first.note(seconds)

    def note_each(self, seconds: float) -> None:
        """Time for each token after the first."""
        self._each.note(seconds)

    def note_end(self, in_flight: int, *, queued: bool) -> None:
        """A request is over. `in_flight` counts it too; `queued`: sequences wait at the worker."""
        now = self._clock()
        samples = max(len(self._first.samples), len(self._each.samples))
        if samples < _STEP_SAMPLES or now - self._stepped < _STEP_SECONDS:
            return
        self._stepped = now
        gradient = min(self._first.gradient(queued=queued), self._each.gradient(queued=queued))
        if gradient < 1 and not queued:
            return
        if gradient >= 1 and in_flight < self._share / 2:
            return  # it is not what holds anybody back
        wanted = self._share * gradient + (_GROWTH if gradient >= 1 else 0)
        self._set((1 - _SMOOTHING) * self._share + _SMOOTHING * wanted)

    def drop(self, in_flight: int) -> None:
        """The worker refused a request for want of room, with `in_flight` of this router's requests there."""
        self._set(_DROP * min(self._share, max(in_flight, self._config.least_concurrency)))

    def _set(self, share: float) -> None:
        self._whole = self._bounded(share) * self._routers

    def _bounded(self, share: float) -> float:
        return min(max(share, self._config.least_concurrency), self._config.most_concurrency)
