"""Hedged prefill: a request whose first token is late is sent to a second replica, and the slower one is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from meshlm.chassis.errors import MeshError
from meshlm.router.streams.dispatch import WorkerCall
from meshlm.v1 import worker_pb2

_KEPT = 200  # times a class of prompts
_LEAST = 20  # of them, before any of its prompts is hedged

Message = worker_pb2.RunGenerationResponse | None


class Hedges:
    """How late a first token may be, from what prompts of about that length took lately. One a router process."""

    def __init__(self, percentile: float) -> None:
        """`percentile`: of the times to the first token; 0: nothing is hedged."""
        self._share = percentile / 100
        self._times: dict[int, deque[float]] = {}

    def note(self, prompt_tokens: int, seconds: float) -> None:
        """A first token came so long after the worker had accepted its request."""
        if self._share:
            self._times.setdefault(prompt_tokens.bit_length(), deque(maxlen=_KEPT)).append(seconds)

    def delay(self, prompt_tokens: int) -> float | None:
        """Seconds after which a second replica is asked; None: never, or too little is known."""
        times = self._times.get(prompt_tokens.bit_length(), ())
        if not self._share or len(times) < _LEAST:
            return None
        return sorted(times)[min(len(times) - 1, round(self._share * len(times)))]


async def race(
    call: WorkerCall, delay: float, second: Callable[[], Awaitable[WorkerCall | None]]
) -> tuple[WorkerCall, Message]:
    """The call whose next message comes first, and that message; the other one is closed. Raises MeshError where
    neither has one.

    `second` opens the other call; None where there is to be none.
    """
    reading = asyncio.ensure_future(call.read())
    opening: asyncio.Future[WorkerCall | None] | None = None
    readings: dict[asyncio.Future[Message], WorkerCall] = {reading: call}
    try:
        await asyncio.wait(readings, timeout=delay)
        if not reading.done():
            opening = asyncio.ensure_future(second())
            # The other may take its time to accept, or never do so: the first goes on without it.
            await asyncio.wait({reading, opening}, return_when=asyncio.FIRST_COMPLETED)
            if not (reading.done() and reading.exception() is None) and (other := await opening) is not None:
                readings[asyncio.ensure_future(other.read())] = other
        winner = await _first(set(readings))
        result = winner.result()
    except BaseException:
        await _leave(opening, but=call)
        raise
    finally:
        for task in readings:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshError):
                await task
    await _leave(opening, but=readings[winner])
    if readings[winner] is not call:
        await call.close(call.usage)
    return readings[winner], result


async def _leave(opening: asyncio.Future[WorkerCall | None] | None, *, but: WorkerCall) -> None:
    """Close the second call, unless it is `but`; if it is not open yet, it is not to be."""
    if opening is None:
        return
    opening.cancel()
    with contextlib.suppress(asyncio.CancelledError, MeshError):
        other = await opening
        if other is not None and other is not but:
            await other.close(other.usage)


async def _first(tasks: set[asyncio.Future[Message]]) -> asyncio.Future[Message]:
    """The first that does not fail, or the last."""
    while True:
        done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        well = [task for task in done if task.exception() is None]
        if well or not tasks:
            return (well or list(done))[0]
