"""Stage 6: between worker and client, each chunk waits until the guard's word covers its text.

The worker is read on while the guard judges, up to `router.guard_hold_tokens` that the guard has not taken; then the
worker waits. Nothing here runs while the client does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any, Protocol

import grpc

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.guarding.held import HeldChoice, Moderation, nonsense
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, worker_pb2

# The worker's own message, before what it lets out; a chunk that may go out now; what the guard says of the answer.
Event = worker_pb2.RunGenerationResponse | pb.Chunk | Moderation


class Ward(Protocol):
    """What a window knows of the guard as a whole."""

    stub: Any  # None: there is no guard
    seconds: float  # that it may be silent while it owes an answer
    hold_tokens: int  # that it need not have taken

    def admit(self) -> None:
        """Raises MeshError GUARD_UNAVAILABLE while the guard is known to be down."""

    def answered(self) -> None:
        """It answered."""

    def failed(self, error: BaseException) -> None:
        """It did not. Raises MeshError GUARD_UNAVAILABLE unless that lets an answer pass."""


class OutputWindow:
    """Chunks come out whole and in order. Once the guard blocks a choice, what is held of it is dropped, and its last
    chunk says CONTENT_FILTER."""

    def __init__(self, ward: Ward, start: guard_pb2.OutputCheckStart) -> None:
        self._ward = ward
        self._start = start
        self._call: Any = None
        self._open = ward.stub is not None  # false once the guard failed and that lets the answer pass
        self._held: dict[int, HeldChoice] = {}
        self._hearing: asyncio.Task[Any] | None = None
        self._heard_at = 0.0  # or when it began to owe
        self._ending = False  # the guard was told that nothing follows, and has not ended its side

    async def open(self) -> None:
        """Begin the check while the worker still computes, so that the first text does not wait for it.

        Raises MeshError GUARD_UNAVAILABLE.
        """
        if not self._open:
            return
        try:
            self._ward.admit()
            self._call = self._ward.stub.CheckOutput(metadata=outgoing_metadata())
        except MeshError as error:
            self._fail(error)
            return
        await self._write(guard_pb2.CheckOutputRequest(start=self._start))

    async def through(self, messages: AsyncIterator[worker_pb2.RunGenerationResponse]) -> AsyncGenerator[Event, None]:
        """The worker's messages, and what may go out. Raises MeshError: the worker's, or GUARD_UNAVAILABLE."""
        if self._ward.stub is None:  # nobody judges: no task and no wait a message
            async for passing in messages:
                yield passing
                if passing.HasField("chunk"):
                    yield passing.chunk
            return
        reading: asyncio.Task[worker_pb2.RunGenerationResponse | None] | None = None
        ended, failure = False, None
        try:
            while True:
                if reading is None and not ended and self._may_read():
                    reading = asyncio.ensure_future(_next(messages))
                if reading is None and not self._owed():
                    break
                await self._wait(reading)
                for event in self._hear():
                    yield event
                if reading is None or not reading.done():
                    continue
                try:
                    message, reading = reading.result(), None
                except MeshError as error:
                    # What came before the fault is still judged, and goes out.
                    message, reading, failure = None, None, error
                    await self._end()
                if message is None:
                    ended = True
                    continue
                yield message
                if message.HasField("chunk"):
                    for event in await self._take(message.chunk, message.skipped_text):
                        yield event
        finally:
            if reading is not None:
                await _cancel(reading)
        if failure is not None:
            raise failure

    async def rest(self) -> AsyncGenerator[Event, None]:
        """After an answer was cut and `through` was left: what the guard still says of text that went out before it was
        judged. Nothing more of the answer goes out. Raises MeshError GUARD_UNAVAILABLE."""
        for held in self._held.values():
            held.drop()
        unjudged = [held for held in self._held.values() if held.ahead and not held.blocked]
        if not self._open or not any(held.sent > held.judged for held in unjudged):
            return
        await self._end()
        while self._owed():
            await self._wait(None)
            for event in self._hear():
                yield event

    @property
    def judged(self) -> bool:
        """Whether all that went out was judged, if there is a guard at all."""
        return self._open or self._ward.stub is None

    @property
    def blocked(self) -> bool:
        """Whether some choice was stopped."""
        return any(held.blocked for held in self._held.values())

    def verdicts(self) -> list[pb.Verdict]:
        """One for each choice that the guard judged, in order; with offsets into the text that went out."""
        return [held.placed_verdict() for _, held in sorted(self._held.items()) if held.verdict is not None]

    async def finish(self) -> None:
        """All is judged: let the guard end its side by itself."""
        if self._call is not None:
            with contextlib.suppress(grpc.RpcError, TimeoutError, asyncio.InvalidStateError):
                async with asyncio.timeout(self._ward.seconds):
                    await self._call.done_writing()
                    while await self._listen() is not grpc.aio.EOF:
                        self._hearing = None

    def close(self) -> None:
        """Cancel the check if it still runs."""
        if self._hearing is not None:
            self._hearing.cancel()
            self._hearing.add_done_callback(_forget)
            self._hearing = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _may_read(self) -> bool:
        waiting = sum(held.untaken_tokens for held in self._held.values())
        return not self._open or waiting < self._ward.hold_tokens

    def _owed(self) -> bool:
        return self._open and (self._ending or any(held.owed for held in self._held.values()))

    def _listen(self) -> asyncio.Task[Any]:
        if self._hearing is None:
            self._hearing = asyncio.ensure_future(self._call.read())
        return self._hearing

    async def _wait(self, reading: asyncio.Task[Any] | None) -> None:
        """For the worker's next message, the guard's, or until the guard has been silent too long."""
        waiting: list[asyncio.Task[Any]] = [] if reading is None else [reading]
        if self._open:
            waiting.append(self._listen())
        patience = None
        if self._owed():
            patience = max(0.0, self._heard_at + self._ward.seconds - time.monotonic())
        await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)

    def _hear(self) -> list[Event]:
        """What the guard's next message lets out, if there is one. Raises MeshError GUARD_UNAVAILABLE."""
        if not self._open:
            return []
        if self._hearing is None or not self._hearing.done():
            late = self._owed() and time.monotonic() >= self._heard_at + self._ward.seconds
            return self._fail(TimeoutError()) if late else []
        hearing, self._hearing = self._hearing, None
        try:
            response = hearing.result()
            if response is grpc.aio.EOF and self._ending:
                self._ending = False
                return []
            if response is grpc.aio.EOF:
                raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard ended its stream")
            held = self._held.get(response.choice)
            if held is None:
                raise nonsense()
            held.accept(response)
        except (grpc.RpcError, asyncio.InvalidStateError, MeshError) as error:
            return self._fail(error)
        self._heard_at = time.monotonic()
        self._ward.answered()
        return list(held.let_out(response))

    async def _take(self, chunk: pb.Chunk, skipped: str) -> list[Event]:
        """The worker's next chunk; `skipped` is text before it that went out in another stream."""
        held = self._held.setdefault(chunk.choice, HeldChoice(chunk.choice))
        if held.blocked:
            return []
        held.add(chunk, skipped)
        if not self._open:
            return list(self._pass())
        if not (skipped or chunk.text or chunk.finish_reason):
            return list(held.pop())  # token counts follow what went out before them, and never overtake held text
        if not held.gather(chunk, skipped, self._ward.hold_tokens):
            return []  # nothing would come of telling it now
        if not any(other.owed for other in self._held.values() if other is not held) and held.all_taken:
            self._heard_at = time.monotonic()
        return await self._write(held.telling())

    async def _write(self, request: guard_pb2.CheckOutputRequest) -> list[Event]:
        """Tell the guard. What goes out if it cannot be told."""
        try:
            async with asyncio.timeout(self._ward.seconds):
                with contextlib.suppress(asyncio.InvalidStateError):  # it ended its side: reading tells why
                    await self._call.write(request)
        except (grpc.RpcError, TimeoutError) as error:
            return self._fail(error)
        return []

    async def _end(self) -> None:
        """Nothing follows, in the middle of an answer: the guard says what it still has to say, and ends."""
        if self._open:
            self._ending, self._heard_at = True, time.monotonic()
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                for held in self._held.values():
                    if held.untold:
                        await self._call.write(held.telling())
                await self._call.done_writing()

    def _fail(self, error: BaseException) -> list[Event]:
        """The guard failed: all that is held goes out, if that is how it is. Raises MeshError GUARD_UNAVAILABLE."""
        self.close()
        self._open = False
        self._ward.failed(error)
        return list(self._pass())

    def _pass(self) -> Iterator[Event]:
        for held in self._held.values():
            yield from held.pop_all()


async def _next(messages: AsyncIterator[worker_pb2.RunGenerationResponse]) -> worker_pb2.RunGenerationResponse | None:
    return await anext(messages, None)


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def _forget(task: asyncio.Task[Any]) -> None:
    """What a cancelled reader raises is nobody's matter."""
    if not task.cancelled():
        task.exception()
