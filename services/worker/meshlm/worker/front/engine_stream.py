"""The events of one sequence, on their way from the engine to whoever streams its answer."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Protocol, Self

from meshlm.worker.messages import Embedded, Finished, NewToken, Scored, Started

Event = Started | NewToken | Scored | Embedded | Finished


class EngineLost(Exception):  # noqa: N818 - named as the condition
    """The engine ended, hangs, or is not there yet. The text is one of ours, fit for clients."""


class Submitter(Protocol):
    """What a stream needs of the client that submitted its sequence."""

    @property
    def crowding(self) -> float:
        """What share of its interval a stream waits between two messages."""

    def send_cancel(self, sequence_id: str) -> None:
        """Ask the engine to end a sequence."""

    def forget(self, sequence_id: str) -> None:
        """Nobody reads the sequence's events any more."""


class EngineStream:
    """The events of one sequence. Use as a context manager: leaving it early cancels the sequence.

    Iterate for batches of whatever came since the last look; or wait for `arrived`, which streams may share, and
    `take` from each. For a while after a look that found tokens, at most `interval` seconds, `arrived` is not set for
    further ones: a message on its way to a caller costs the machine a hundred times what a token more in it does.
    Starts, ends and losses, and tokens after a pause, are told at once.
    """

    def __init__(
        self, submitter: Submitter, sequence_id: str, arrived: asyncio.Event, *, interval: float = 0.0
    ) -> None:
        self.id = sequence_id
        self.arrived = arrived
        self.started = False  # left the waiting queue
        self.ended = False  # no event will come after those not yet taken
        self._submitter = submitter
        self._events: list[Event] = []
        self._lost: EngineLost | None = None
        self._interval = interval
        self._quiet_until = 0.0  # seconds, `time.monotonic`
        self._alarm: asyncio.TimerHandle | None = None  # set while events wait for the end of the interval

    def take(self) -> list[Event]:
        """What came since the last call. Raises EngineLost, after the events that came before the loss."""
        if self._lost is not None:
            if not self._events:
                raise self._lost
            self.arrived.set()  # there is one more thing to be told
        events, self._events = self._events, []
        self._silence()
        if self._interval and any(isinstance(event, NewToken) for event in events):
            # To the end of an interval that all streams share: what goes out together wakes every service once.
            interval = self._interval * self._submitter.crowding
            self._quiet_until = (time.monotonic() // interval + 1) * interval
        return events

    def push(self, event: Event) -> None:
        self._events.append(event)
        self.started = True  # a sequence that ends while it waits does not wait either
        self.ended = self.ended or isinstance(event, Finished)
        if not isinstance(event, NewToken):
            self.arrived.set()
        elif self._alarm is None:
            if time.monotonic() >= self._quiet_until:
                self.arrived.set()
            else:
                self._alarm = asyncio.get_running_loop().call_at(self._quiet_until, self.arrived.set)

    def lose(self, error: EngineLost) -> None:
        self._lost, self.ended = error, True
        self.arrived.set()

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def cancel(self) -> None:
        """Asks the engine to end the sequence; its `Finished` still comes."""
        if not self.ended:
            self._submitter.send_cancel(self.id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        while not (events := self.take()):
            if self.ended:
                raise StopAsyncIteration
            self.arrived.clear()
            await self.arrived.wait()
        return events

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._silence()
        self.cancel()
        self._submitter.forget(self.id)
