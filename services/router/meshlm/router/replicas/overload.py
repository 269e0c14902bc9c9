"""Who waits when every worker has its hands full, for how long, and who is refused: a bounded queue a priority.

A request that is let in has a place at a worker (an `Attempt`) from then on; a place that ends wakes the next. Nothing
is lost by a cancel: a place that was given to somebody who has left meanwhile is given back.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name, meter, span
from meshlm.router.replicas.choosing import Choice, Wanted
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.replicas.replica import Attempt
from meshlm.router.replicas.residency import Regions
from meshlm.v1 import generation_pb2 as pb

# Ends of requests from which it is told how fast places come free.
_LATEST = 64
_TELLING = 8
_RETRY_SECONDS = 1.0


class Urgency(IntEnum):
    """The order in which requests are let in, and the reverse of that in which they are shed."""

    CRITICAL = 0
    DEFAULT = 1
    SHEDDABLE = 2

    @property
    def share(self) -> float:
        """How full a worker may be for one of these to be let in: the rest is kept for the more urgent."""
        return {Urgency.CRITICAL: 1.0, Urgency.DEFAULT: 0.9, Urgency.SHEDDABLE: 0.7}[self]


def urgency_of(priority: pb.Priority.ValueType) -> Urgency:
    """`critical` is CRITICAL, `batch` SHEDDABLE, and what is between DEFAULT: workers order that by themselves."""
    return {pb.PRIORITY_CRITICAL: Urgency.CRITICAL, pb.PRIORITY_BATCH: Urgency.SHEDDABLE}.get(priority, Urgency.DEFAULT)


Place = tuple[Choice, Attempt]


@dataclass(eq=False)
class Waiter:
    """One that waits. All of a line can use the same workers: if there is no room for its first, there is for none."""

    urgency: Urgency
    line: tuple[str, Regions]
    take: Callable[[], Place | None]
    granted: asyncio.Future[Place]


class Overload:
    """The queues of one router."""

    def __init__(self, config: OverloadConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes = (config.critical_queue, config.default_queue, config.sheddable_queue)
        self._seconds = config.queue_seconds
        self._clock = clock
        self._queues: tuple[deque[Waiter], ...] = tuple(deque() for _ in Urgency)
        self._ends: dict[str, deque[float]] = {}
        self._shed = meter().create_counter(Name.OVERLOAD_SHED, "{request}", "Requests refused for want of room")
        self._depth = meter().create_gauge(Name.OVERLOAD_QUEUED, "{request}", "Requests that wait for a worker")
        self._wait = meter().create_histogram(Name.OVERLOAD_WAIT, "s", "Time that requests waited for a worker")

    def waiting(self, urgency: Urgency) -> int:
        return len(self._queues[urgency])

    async def enter(
        self, wanted: Wanted, urgency: Urgency, take: Callable[[], Place | None], seconds_left: float
    ) -> Place:
        """A place at a worker, now or after waiting for it. `take` gives one if there is room; it may raise MeshError.

        Raises MeshError OVERLOADED where the queue is full, where it cannot be in time, or was not; DEADLINE.
        """
        line = (wanted.model, wanted.regions)
        if not any(waiter.line == line for waiter in self._ahead(urgency)):
            place = take()
            if place is not None:
                return place
        wait = self.predicted_wait(wanted.model, urgency)
        self._check(urgency, wait, min(seconds_left, self._seconds))
        with span("router.queue", {Name.PRIORITY: urgency.name.lower(), Name.OVERLOAD_PREDICTED: wait}):
            return await self._queue(
                Waiter(urgency, line, take, asyncio.get_running_loop().create_future()), seconds_left
            )

    def note_end(self, model: str) -> None:
        """A place came free."""
        self._ends.setdefault(model, deque(maxlen=_LATEST)).append(self._clock())
        self.wake()

    def wake(self) -> None:
        """Let in whoever there is room for, most urgent first, first come first served among equals."""
        blocked: set[tuple[str, Regions]] = set()
        for queue in self._queues:
            for waiter in list(queue):
                if waiter.line in blocked or waiter.granted.done():
                    continue
                try:
                    place = waiter.take()
                except MeshError as error:
                    waiter.granted.set_exception(error)
                    continue
                if place is None:
                    blocked.add(waiter.line)  # whoever is less urgent has less room
                else:
                    waiter.granted.set_result(place)

    def predicted_wait(self, model: str, urgency: Urgency) -> float:
        """Seconds until it would be the turn of one that came now, as fast as places came free lately; 0 where that
        is not known."""
        ends = self._ends.get(model, deque())
        ahead = sum(waiter.line[0] == model for waiter in self._ahead(urgency))
        if len(ends) < _TELLING:
            return 0.0
        rate = len(ends) / max(self._clock() - ends[0], 1e-3)
        return (ahead + 1) / rate

    def _ahead(self, urgency: Urgency) -> Iterator[Waiter]:
        return (waiter for queue in self._queues[: urgency + 1] for waiter in queue if not waiter.granted.done())

    def _check(self, urgency: Urgency, wait: float, most: float) -> None:
        if len(self._queues[urgency]) >= self._sizes[urgency]:
            raise self._refuse(urgency, "queue_full", wait)
        if wait > most:
            raise self._refuse(urgency, "too_late", wait)

    async def _queue(self, waiter: Waiter, seconds_left: float) -> Place:
        queue, begun = self._queues[waiter.urgency], self._clock()
        queue.append(waiter)
        self._tell(waiter.urgency)
        try:
            async with asyncio.timeout(min(seconds_left, self._seconds)):
                return await waiter.granted
        except TimeoutError:
            self._give_back(waiter)
            if seconds_left <= self._seconds:
                raise MeshError(Reason.DEADLINE, "the deadline passed while waiting for a worker") from None
            raise self._refuse(waiter.urgency, "waited", self._seconds) from None
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        finally:
            queue.remove(waiter)
            self._tell(waiter.urgency)
            self._wait.record(self._clock() - begun, {Name.PRIORITY: waiter.urgency.name.lower()})

    def _give_back(self, waiter: Waiter) -> None:
        """Its place, if it was given one just as it left."""
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            granted.result()[1].end()
        granted.cancel()

    def _refuse(self, urgency: Urgency, cause: str, wait: float) -> MeshError:
        name = urgency.name.lower()
        self._shed.add(1, {Name.PRIORITY: name, "cause": cause})
        return MeshError(
            Reason.OVERLOADED,
            "every worker of this model has its hands full",
            metadata={"priority": name, "cause": cause},
            retry_after=max(wait, _RETRY_SECONDS),
        )

    def _tell(self, urgency: Urgency) -> None:
        self._depth.set(len(self._queues[urgency]), {Name.PRIORITY: urgency.name.lower()})
