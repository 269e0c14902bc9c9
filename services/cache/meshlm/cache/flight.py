"""Single flight: of identical requests at the same time one generates, and the others get its answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum

from meshlm.cache.key import Key
from meshlm.cache.store import Found, Store, StoreLostError
from meshlm.v1 import cache_pb2

# Flights end in this process (a wake-up) or in another (seen by asking again): seconds between two questions.
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.1
# Flights remembered that the store may have begun, though its reply did not come.
_MOST_DOUBTFUL = 1000


class Outcome(StrEnum):
    HIT = "hit"
    SHARED = "shared"
    LEAD = "lead"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Landing:
    """How a lookup ended. `answer` for HIT and SHARED, `flight` for LEAD."""

    outcome: Outcome
    answer: cache_pb2.CachedAnswer | None = None
    flight: str = ""


class Flights:
    """Lookups that wait for each other. Raises StoreLostError where the store does."""

    def __init__(self, store: Store, *, lease_seconds: float, ttl_seconds: float) -> None:
        self._store = store
        self._lease = lease_seconds
        self._ttl = ttl_seconds
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._giving_back: set[asyncio.Task[None]] = set()
        self._doubtful: deque[tuple[Key, str]] = deque(maxlen=_MOST_DOUBTFUL)
        self._draining = False

    async def look_up(self, key: Key, *, wait: float, refresh: bool = False) -> Landing:
        """The answer or the lead; TIMEOUT after `wait` seconds of another's flight.

        A cancelled lookup leaves no flight behind, wherever the cancel strikes.
        """
        flight = secrets.token_hex(16)
        until = time.monotonic() + wait
        pause = _FIRST_PAUSE
        waited = False
        while True:
            with self._awake(key) as woken:
                found = await self._ask(key, flight, refresh)
                if found.answer is not None:
                    return Landing(Outcome.SHARED if waited else Outcome.HIT, found.answer)
                if found.lead:
                    return Landing(Outcome.LEAD, flight=flight)
                left = until - time.monotonic()
                if left <= 0 or self._draining:
                    return Landing(Outcome.TIMEOUT)
                with suppress(TimeoutError):  # no wait_for: Python 3.11's may swallow a cancel
                    async with asyncio.timeout(min(pause, left)):
                        await woken.wait()
            waited = True
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    async def land(self, key: Key, flight: str, answer: cache_pb2.CachedAnswer) -> bool:
        """Store the flight's answer; False if another took the flight over when its lease ended."""
        kept = await self._store.store(key, flight, answer, self._ttl)
        self._wake(key)
        return kept

    async def release(self, key: Key, flight: str) -> None:
        """End the flight without an answer."""
        await self._store.release(key, flight)
        self._wake(key)

    def give_back(self, key: Key, flight: str) -> None:
        """Release a flight whose holder is gone, in the background. If that fails too, its lease ends it."""

        async def release() -> None:
            with suppress(StoreLostError):
                await self.release(key, flight)

        self._keep(asyncio.create_task(release()))

    def drain(self) -> None:
        """From now on nobody waits for another: a wait may be longer than the time that is left to end."""
        self._draining = True
        for events in self._waiting.values():
            for event in events:
                event.set()

    async def close(self) -> None:
        """Wait for flights being given back."""
        await asyncio.gather(*self._giving_back)

    async def _ask(self, key: Key, flight: str, refresh: bool) -> Found:
        # The script runs on even if the caller goes: only its reply tells whether there is a lead to give back.
        asked = asyncio.ensure_future(self._store.find_or_lead(key, flight, self._lease, refresh=refresh))
        try:
            found = await asyncio.shield(asked)
        except asyncio.CancelledError:
            self._keep(asyncio.create_task(self._undo(key, flight, asked)))
            raise
        except StoreLostError:
            self._doubtful.append((key, flight))  # a store that is only slow runs the script all the same
            raise
        while self._doubtful:  # it answers: what it was asked before is done
            self.give_back(*self._doubtful.popleft())
        return found

    async def _undo(self, key: Key, flight: str, asked: asyncio.Future[Found]) -> None:
        with suppress(StoreLostError):
            if (await asked).lead:
                await self.release(key, flight)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)

    @contextmanager
    def _awake(self, key: Key) -> Iterator[asyncio.Event]:
        """An event that is set when a flight of this key ends in this process; armed before the store is asked."""
        event = asyncio.Event()
        self._waiting[key.answer].add(event)
        try:
            yield event
        finally:
            events = self._waiting[key.answer]
            events.discard(event)
            if not events:
                del self._waiting[key.answer]

    def _wake(self, key: Key) -> None:
        for event in self._waiting.get(key.answer, ()):
            event.set()
