"""Stages 5 and 6: what the guard says of the input, and how far it lets the answer go."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import structlog
from opentelemetry.trace import Span

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error, invalid
from meshlm.chassis.telemetry import Name, client_span, fail
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, guard_pb2_grpc

log = structlog.get_logger()

_SERVICE = "meshlm.v1.GuardService"
T = TypeVar("T")


class Guards:
    """The guard service, as the router sees it. Fails closed unless the key's policy says otherwise."""

    def __init__(self, config: RouterConfig) -> None:
        self._channel = open_channel(config.guard, retryable=[(_SERVICE, "CheckInput")]) if config.guard else None
        self._stub: Any = guard_pb2_grpc.GuardServiceStub(self._channel) if self._channel is not None else None
        self._seconds = config.guard_seconds

    async def stop(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def check_input(
        self, request_id: str, key: KeyConfig, source: pb.Input, token_text: str, *, seconds_left: float
    ) -> pb.Verdict | None:
        """The verdict; None where there is no guard, or where it failed and the key's policy lets that pass.

        Raises MeshError INJECTION_SUSPECTED, PROMPT_UNSAFE, REQUEST_INVALID, GUARD_UNAVAILABLE or DEADLINE.
        """
        if self._stub is None:
            return None
        request = guard_pb2.CheckInputRequest(
            request_id=request_id, tenant=key.tenant, policy=key.guard_policy, input=source, token_text=token_text
        )
        with client_span(_SERVICE, "CheckInput") as span:
            timeout = min(self._seconds, seconds_left)
            try:
                response = await self._stub.CheckInput(request, timeout=timeout, metadata=outgoing_metadata())
            except grpc.RpcError as error:
                fail(span, error.code().name)
                if timeout < self._seconds and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise MeshError(Reason.DEADLINE, "the deadline passed") from None
                if _declined(error) in ("", "input"):  # not `policy`, which is no fault of the caller's
                    raise invalid("generation.input", "longer than the guard can judge") from None
                _on_failure(key, error)
                return None
            _describe(span, response.verdict)
        if response.verdict.action == pb.Verdict.ACTION_BLOCK:
            raise _refusal(response.verdict)
        verdict: pb.Verdict = response.verdict
        return verdict

    def open_output(
        self, request_id: str, key: KeyConfig, source: pb.Input, canaries: Sequence[str] = ()
    ) -> OutputWindow:
        """Checks one answer as it is made; it may hold none of `canaries`. Close it on every ending."""
        start = guard_pb2.OutputCheckStart(
            request_id=request_id, tenant=key.tenant, policy=key.guard_policy, input=source, canaries=canaries
        )
        return OutputWindow(self._stub, start, key, self._seconds)


@dataclass
class _Held:
    """A choice's chunks that no verdict covers yet."""

    chunks: deque[tuple[pb.Chunk, int]] = field(default_factory=deque)  # with the end of its text, characters
    chars: int = 0  # of the choice's whole text so far
    verdict: pb.Verdict | None = None
    blocked: bool = False


class OutputWindow:
    """Between worker and client: holds each chunk until the guard's verdict covers its text.

    Chunks come out whole and in order. Once the guard blocks a choice, what is held of it is dropped, and its last
    chunk says CONTENT_FILTER.
    """

    def __init__(self, stub: Any, start: guard_pb2.OutputCheckStart, key: KeyConfig, seconds: float) -> None:
        self._stub = stub
        self._start = start
        self._key = key
        self._seconds = seconds
        self._call: Any = None
        self._open = stub is not None  # false once the guard failed and the key's policy let that pass
        self._held: dict[int, _Held] = {}

    async def open(self) -> None:
        """Begin the check while the worker still computes, so that the first text does not wait for it.

        Raises MeshError GUARD_UNAVAILABLE.
        """
        if self._open:
            await self._guarded(self._begin())

    async def pass_through(self, chunk: pb.Chunk, skipped: str = "") -> list[pb.Chunk]:
        """The chunks of this choice that may go out now; `skipped` is text before it that went out in another stream.

        Raises MeshError GUARD_UNAVAILABLE.
        """
        held = self._held.setdefault(chunk.choice, _Held())
        if held.blocked:
            return []
        text = skipped + chunk.text
        held.chars += len(text)
        held.chunks.append((chunk, held.chars))
        last = chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        released = await self._judge(chunk.choice, text, last) if self._open and (text or last) else None
        if released is None:
            return list(_pop(held, held.chars if not self._open else _released_before(held)))
        held.verdict = released.verdict
        ready = list(_pop(held, released.released_chars))
        if released.verdict.action == pb.Verdict.ACTION_BLOCK:
            held.blocked = True
            ready.append(_stopped(held, chunk.choice, ready))
        return ready

    @property
    def judged(self) -> bool:
        """Whether all that went out was judged, if there is a guard at all."""
        return self._open or self._stub is None

    @property
    def blocked(self) -> bool:
        """Whether some choice was stopped."""
        return any(held.blocked for held in self._held.values())

    def verdicts(self) -> list[pb.Verdict]:
        """One for each choice that the guard judged, in order."""
        return [held.verdict for _, held in sorted(self._held.items()) if held.verdict is not None]

    async def finish(self) -> None:
        """All is judged: let the guard end its side by itself."""
        if self._call is not None:
            with contextlib.suppress(grpc.RpcError, TimeoutError, asyncio.InvalidStateError):
                async with asyncio.timeout(self._seconds):
                    await self._call.done_writing()
                    await self._call.read()

    def close(self) -> None:
        """Cancel the check if it still runs."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _judge(self, choice: int, text: str, last: bool) -> guard_pb2.CheckOutputResponse | None:
        return await self._guarded(self._ask(guard_pb2.OutputText(choice=choice, text=text, last=last)))

    async def _begin(self) -> None:
        self._call = self._stub.CheckOutput(metadata=outgoing_metadata())
        await self._call.write(guard_pb2.CheckOutputRequest(start=self._start))

    async def _ask(self, text: guard_pb2.OutputText) -> guard_pb2.CheckOutputResponse:
        with contextlib.suppress(asyncio.InvalidStateError):  # the guard ended its side: reading tells why
            await self._call.write(guard_pb2.CheckOutputRequest(text=text))
        answer = await self._call.read()
        if answer is grpc.aio.EOF:
            raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard ended its stream")
        response: guard_pb2.CheckOutputResponse = answer
        return response

    async def _guarded(self, talk: Awaitable[T]) -> T | None:
        """Its result, within the time a guard has; None where it failed and the key's policy lets that pass."""
        try:
            async with asyncio.timeout(self._seconds):
                return await talk
        except (grpc.RpcError, TimeoutError, asyncio.InvalidStateError, MeshError) as error:
            self.close()
            _on_failure(self._key, error)
            self._open = False
            return None


def _released_before(held: _Held) -> int:
    """Chunks without text (token counts) follow what went out before them, and never overtake held text."""
    return held.chars if len(held.chunks) == 1 else -1


def _pop(held: _Held, chars: int) -> Iterator[pb.Chunk]:
    while held.chunks and held.chunks[0][1] <= chars:
        yield held.chunks.popleft()[0]


def _stopped(held: _Held, choice: int, ready: list[pb.Chunk]) -> pb.Chunk:
    dropped = held.chunks[0][0] if held.chunks else None
    held.chunks.clear()
    if dropped is not None:
        offset = dropped.token_offset
    else:
        offset = ready[-1].token_offset + ready[-1].token_count if ready else 0
    return pb.Chunk(choice=choice, token_offset=offset, finish_reason=pb.FINISH_REASON_CONTENT_FILTER)


def _on_failure(key: KeyConfig, error: BaseException) -> None:
    """Raises MeshError GUARD_UNAVAILABLE, unless the guard cannot answer and the key's policy lets that pass."""
    log.warning("the guard does not answer", failure=key.guard_failure, error=type(error).__name__)
    if _declined(error) is not None:  # it does answer: callers must not get by with what it will not judge
        raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard cannot judge this text") from None
    if key.guard_failure == "refuse":
        raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard does not answer", retry_after=1.0) from None


def _declined(error: BaseException) -> str | None:
    """The field at fault where the guard will not judge what it was sent (empty: the whole); None if it failed."""
    if not isinstance(error, grpc.RpcError):
        return None
    answer = from_rpc_error(error)
    return answer.metadata.get("field", "") if answer.reason == Reason.REQUEST_INVALID else None


def _refusal(verdict: pb.Verdict) -> MeshError:
    metadata = {"categories": ",".join(verdict.categories), "policy_version": verdict.policy_version}
    if all(category.startswith(("injection.", "jailbreak.")) for category in verdict.categories):
        return MeshError(Reason.INJECTION_SUSPECTED, "the input looks like an attack on the model", metadata=metadata)
    return MeshError(Reason.PROMPT_UNSAFE, "the input is not allowed by policy", metadata=metadata)


def _describe(span: Span, verdict: pb.Verdict) -> None:
    span.set_attribute(Name.GUARD_ACTION, pb.Verdict.Action.Name(verdict.action).removeprefix("ACTION_").lower())
    span.set_attribute(Name.GUARD_CATEGORIES, list(verdict.categories))
    span.set_attribute(Name.GUARD_SCORE, verdict.score)
    span.set_attribute(Name.GUARD_POLICY, verdict.policy_version)
