"""Stage 6: between worker and client, each chunk waits until the guard's word covers its text.

The worker is read on while the guard judges, up to `router.guard_hold_tokens` that the guard has not taken; then the
worker waits. Nothing here runs while the client does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.guarding.redaction import Redactions
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, inference_pb2, worker_pb2

Moderation = inference_pb2.Moderation
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


@dataclass
class _Held:
    """One choice: what is held of it, and what the guard said."""

    chunks: deque[tuple[pb.Chunk, int]] = field(default_factory=deque)  # with where its text begins, characters
    chars: int = 0  # received
    size: int = 0  # the same, bytes
    told: int = 0  # characters that the guard was told
    gather: int = 0  # bytes before which it lets no more out, whatever it is told
    gathered: list[str] = field(default_factory=list)  # what it was not told yet
    gathered_tokens: int = 0
    ended: bool = False  # its last chunk was received
    released: int = 0
    taken: int = 0
    judged: int = 0
    final: bool = False
    verdict: pb.Verdict | None = None
    blocked: bool = False
    untaken: deque[tuple[int, int]] = field(default_factory=deque)  # end of a text, and its tokens
    redactions: Redactions = field(default_factory=Redactions)
    sent: int = 0  # characters that went out, as received
    next_token: int = 0  # offset after the last token that went out
    checked: int = 0  # the last check_offset told
    ahead: bool = False  # the guard tells how far it judged: text may go out before that

    @property
    def owed(self) -> bool:
        """Whether the guard has something to say yet."""
        return not self.blocked and not self.final and (self.taken < self.told or self.ended)


class OutputWindow:
    """Chunks come out whole and in order. Once the guard blocks a choice, what is held of it is dropped, and its last
    chunk says CONTENT_FILTER."""

    def __init__(self, ward: Ward, start: guard_pb2.OutputCheckStart) -> None:
        self._ward = ward
        self._start = start
        self._call: Any = None
        self._open = ward.stub is not None  # false once the guard failed and that lets the answer pass
        self._held: dict[int, _Held] = {}
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
            held.chunks.clear()
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
        return [_placed(held) for _, held in sorted(self._held.items()) if held.verdict is not None]

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
        waiting = sum(tokens for held in self._held.values() for _, tokens in held.untaken)
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
            held = self._accept(response)
        except (grpc.RpcError, asyncio.InvalidStateError, MeshError) as error:
            return self._fail(error)
        self._heard_at = time.monotonic()
        self._ward.answered()
        return list(self._let_out(response, held))

    def _accept(self, response: guard_pb2.CheckOutputResponse) -> _Held:
        """Take what the guard says. Raises MeshError GUARD_UNAVAILABLE if it cannot be true."""
        held = self._held.get(response.choice)
        if held is None:
            raise _nonsense()
        held.ahead = response.HasField("judged_chars")
        judged = response.judged_chars if held.ahead else held.judged
        for before, now in ((held.released, response.released_chars), (held.taken, response.taken_chars)):
            if not before <= now <= held.chars:
                raise _nonsense()
        if not held.judged <= judged <= held.chars:
            raise _nonsense()
        for found in response.redactions:
            if not max(held.redactions.end, held.released) <= found.char_start < found.char_end <= held.chars:
                raise _nonsense()
            held.redactions.add(found)
        held.released, held.taken = response.released_chars, response.taken_chars
        held.gather = response.gather_bytes
        held.final = held.final or response.final
        held.verdict = response.verdict
        while held.untaken and (held.final or held.untaken[0][0] <= held.taken):
            held.untaken.popleft()
        return held

    def _let_out(self, response: guard_pb2.CheckOutputResponse, held: _Held) -> Iterator[Event]:
        if held.blocked:
            return
        yield from _pop(held)
        if response.HasField("judged_chars") and response.judged_chars > held.judged:
            passed = _moderation(held, response.choice, Moderation.ACTION_PASS, held.judged, response.judged_chars)
            held.judged = response.judged_chars
            yield passed
        if response.verdict.action == pb.Verdict.ACTION_BLOCK:
            held.blocked = True
            held.untaken.clear()
            yield _end_of(held, response.choice)
            yield _stopped(held, response.choice)

    async def _take(self, chunk: pb.Chunk, skipped: str) -> list[Event]:
        """The worker's next chunk; `skipped` is text before it that went out in another stream."""
        held = self._held.setdefault(chunk.choice, _Held())
        if held.blocked:
            return []
        held.chunks.append((chunk, held.chars + len(skipped)))
        if skipped:
            held.sent = len(skipped)
        text, last = skipped + chunk.text, chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        held.chars += len(text)
        held.size += len(text) if text.isascii() else len(text.encode())
        held.ended = last
        if not self._open:
            return list(self._pass())
        if not (text or last):
            return list(_pop(held))  # token counts follow what went out before them, and never overtake held text
        held.gathered.append(text)
        held.gathered_tokens += chunk.token_count
        if not last and held.size < held.gather and held.gathered_tokens < self._ward.hold_tokens:
            return []  # nothing would come of telling it now
        if not any(other.owed for other in self._held.values() if other is not held) and not held.untaken:
            self._heard_at = time.monotonic()
        return await self._write(_telling(held, chunk.choice))

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
                for choice, held in self._held.items():
                    if held.gathered and not held.blocked:
                        await self._call.write(_telling(held, choice))
                await self._call.done_writing()

    def _fail(self, error: BaseException) -> list[Event]:
        """The guard failed: all that is held goes out, if that is how it is. Raises MeshError GUARD_UNAVAILABLE."""
        self.close()
        self._open = False
        self._ward.failed(error)
        return list(self._pass())

    def _pass(self) -> Iterator[Event]:
        for held in self._held.values():
            if not held.blocked:
                held.released, held.final = held.chars, True
                yield from _pop(held)


def _telling(held: _Held, choice: int) -> guard_pb2.CheckOutputRequest:
    """What the guard was not told yet of a choice."""
    message = guard_pb2.OutputText(choice=choice, text="".join(held.gathered), last=held.ended)
    held.untaken.append((held.chars, held.gathered_tokens))
    held.told = held.chars
    held.gathered.clear()
    held.gathered_tokens = 0
    return guard_pb2.CheckOutputRequest(text=message)


def _pop(held: _Held) -> Iterator[pb.Chunk]:
    """Chunks whose text is released; a choice's last one, once its verdict is final."""
    while held.chunks:
        chunk, start = held.chunks[0]
        last = chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        if start + len(chunk.text) > held.released or (last and not held.final):
            return
        held.chunks.popleft()
        held.sent = start + len(chunk.text)
        held.next_token = chunk.token_offset + chunk.token_count
        yield held.redactions.rewrite(chunk, start)


def _end_of(held: _Held, choice: int) -> Moderation:
    """What is said where a choice is stopped: to take back what was sent and never passed, or that nothing was."""
    assert held.verdict is not None  # noqa: S101
    start, end = held.verdict.char_start, held.verdict.char_end
    if held.sent > max(start, held.judged):
        return _moderation(held, choice, Moderation.ACTION_RETRACT, max(start, held.judged), held.sent)
    return _moderation(held, choice, Moderation.ACTION_STOP, start, end)


def _moderation(held: _Held, choice: int, action: Moderation.Action.ValueType, start: int, end: int) -> Moderation:
    verdict, place = held.verdict, held.redactions.place
    if verdict is not None and action == Moderation.ACTION_PASS and verdict.action == pb.Verdict.ACTION_BLOCK:
        verdict = None  # what it says is of the text behind
    held.checked = max(held.checked, place(end))
    return Moderation(
        choice=choice,
        check_offset=held.checked,
        char_start=place(start),
        char_end=place(end),
        categories=verdict.categories if verdict is not None else (),
        score=verdict.score if verdict is not None else 0.0,
        action=action,
    )


def _placed(held: _Held) -> pb.Verdict:
    verdict = pb.Verdict()
    verdict.CopyFrom(held.verdict or verdict)
    verdict.char_start = held.redactions.place(verdict.char_start)
    verdict.char_end = held.redactions.place(verdict.char_end)
    return verdict


def _stopped(held: _Held, choice: int) -> pb.Chunk:
    offset = held.chunks[0][0].token_offset if held.chunks else held.next_token
    held.chunks.clear()
    return pb.Chunk(choice=choice, token_offset=offset, finish_reason=pb.FINISH_REASON_CONTENT_FILTER)


def _nonsense() -> MeshError:
    return MeshError(Reason.GUARD_UNAVAILABLE, "the guard's answers contradict each other")


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
