"""The Python client: `AsyncMesh` for asyncio, `Mesh` for everyone else.

    async with AsyncMesh("127.0.0.1:50051", key=key) as mesh:
        async for event in mesh.stream(messages=[("user", "Hello")], max_tokens=64):
            if isinstance(event, Text):
                print(event.text, end="")

Errors are `MeshError` with the mesh's own reasons. Closing a stream's iterator cancels the generation.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.mesh.events import Answer, End, Event, Moderated, Start, StreamReader, Text, answer_of
from meshlm.mesh.requests import Asked, Turn, generation, input_of
from meshlm.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

T = TypeVar("T")

_SERVICE = "meshlm.v1.InferenceService"
_RETRYABLE = tuple((_SERVICE, method) for method in ("ListModels", "CountTokens", "ExplainRoute"))
# Another replica, or the same one in a moment, can go on with the answer.
_RESUMABLE = frozenset({Reason.ENGINE_LOST, Reason.NO_REPLICA, Reason.DRAINING, Reason.OVERLOADED})
_RESUME_DELAY = 0.2
# Before calls that nobody took are made again, seconds; the channel tries again after 0.1 (channels.py).
_RECONNECT_PAUSES = (0.15, 0.3)


def _untaken(error: grpc.RpcError) -> bool:
    """Whether nobody took the call, if this is all that was heard. A router that ends resets connections that it had
    not taken yet, and refuses calls on the youngest of the others, whoever else listens on its port."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return "failed to connect" in (error.details() or "") or from_rpc_error(error).reason is Reason.DRAINING


async def _messages(make: Callable[[], Any]) -> AsyncGenerator[Any, None]:
    """Of a call, which is made again while nobody takes it."""
    for pause in (*_RECONNECT_PAUSES, None):
        call, heard = make(), False
        try:
            async for message in call:
                heard = True
                yield message
            return
        except grpc.RpcError as error:
            if pause is None or heard or not _untaken(error):
                raise
        finally:
            call.cancel()  # nothing, unless the caller left early
        await asyncio.sleep(pause)


class AsyncMesh:
    """A connection to a mesh's router; use as an async context manager, or call `close`."""

    def __init__(self, target: str, *, key: str = "", deadline: float | None = 300.0) -> None:
        """`target` is host:port or unix:PATH; `deadline` (seconds) bounds each call that names none itself."""
        self._channel = open_channel(target, retryable=_RETRYABLE, max_receive_bytes=64 * 1024 * 1024)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._key = key
        self._deadline = deadline

    async def stream(
        self, *, deadline: float | None = None, resumes: int = 0, request_id: str = "", **asked: Unpack[Asked]
    ) -> AsyncGenerator[Event, None]:
        """A `Start`, then `Text` as it is made, `Moderated` where the guard says something of it, then an `End`.

        Raises MeshError.

        `resumes` is how many times a stream that broke may be gone on with; each resume tells a `Start` of its own.
        """
        wanted = generation(**asked)
        reader, ends_at = StreamReader(), self._ends_at(deadline)
        request = inference_pb2.StreamGenerateRequest(generation=wanted, resumable=resumes > 0)
        while True:
            try:
                async with aclosing(self._attempt(request, reader, ends_at, request_id)) as events:
                    async for event in events:
                        if isinstance(event, Start):
                            _pin(request.generation, event.routing)
                        yield event
                return
            except MeshError as error:
                if resumes == 0 or error.reason not in _RESUMABLE:
                    raise
                resumes -= 1
                reader.resume(request)
                await asyncio.sleep(error.retry_after or _RESUME_DELAY)

    async def _attempt(
        self,
        request: inference_pb2.StreamGenerateRequest,
        reader: StreamReader,
        ends_at: float | None,
        request_id: str,
    ) -> AsyncGenerator[Event, None]:
        metadata, ended = self._metadata(request_id), False
        calls = _messages(lambda: self._stub.StreamGenerate(request, metadata=metadata, timeout=_left(ends_at)))
        try:
            async with aclosing(calls) as messages:
                async for message in messages:
                    event = reader.read(message)
                    if event is not None:
                        ended = ended or isinstance(event, End)
                        yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        if not ended:
            raise MeshError(Reason.INTERNAL, "the stream ended without its last message")

    async def generate(self, *, deadline: float | None = None, request_id: str = "", **asked: Unpack[Asked]) -> Answer:
        """The whole answer at once. Raises MeshError."""
        request = inference_pb2.GenerateRequest(generation=generation(**asked))
        return answer_of(await self._unary(self._stub.Generate, request, deadline, request_id))

    async def list_models(self, *, deadline: float | None = None) -> Sequence[inference_pb2.Model]:
        """The models that this key may use, by name. Raises MeshError."""
        response = await self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest(), deadline)
        return tuple(response.models)

    async def count_tokens(
        self,
        *,
        messages: Sequence[Turn] | None = None,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        deadline: float | None = None,
    ) -> int:
        """Tokens of an input, chat template included. Raises MeshError."""
        request = inference_pb2.CountTokensRequest(model=model, input=input_of(messages, prompt, token_ids))
        response = await self._unary(self._stub.CountTokens, request, deadline)
        return int(response.prompt_tokens)

    async def explain(
        self, *, deadline: float | None = None, **asked: Unpack[Asked]
    ) -> inference_pb2.ExplainRouteResponse:
        """What would happen to this request, and why, without running it. Raises MeshError if it makes no sense."""
        request = inference_pb2.ExplainRouteRequest(generation=generation(**asked))
        response: inference_pb2.ExplainRouteResponse = await self._unary(self._stub.ExplainRoute, request, deadline)
        return response

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._channel.close()

    async def _unary(self, method: Any, request: Any, deadline: float | None, request_id: str = "") -> Any:
        metadata, ends_at = self._metadata(request_id), self._ends_at(deadline)
        for pause in (*_RECONNECT_PAUSES, None):
            try:
                return await method(request, metadata=metadata, timeout=_left(ends_at))
            except grpc.RpcError as error:
                if pause is None or not _untaken(error):
                    raise from_rpc_error(error) from None
            await asyncio.sleep(pause)
        return None

    def _metadata(self, request_id: str) -> list[tuple[str, str]]:
        metadata = [("authorization", f"Bearer {self._key}")] if self._key else []
        return [*metadata, ("x-request-id", request_id)] if request_id else metadata

    def _ends_at(self, deadline: float | None) -> float | None:
        seconds = self._deadline if deadline is None else deadline
        return None if seconds is None else time.monotonic() + seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        await self.close()


class Mesh:
    """`AsyncMesh` for code without asyncio: the same calls, on an event loop in a thread of its own."""

    def __init__(self, target: str, *, key: str = "", deadline: float | None = 300.0) -> None:
        """As `AsyncMesh`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="meshlm-client", daemon=True)
        self._thread.start()
        self._mesh = self._wait(_opened(target, key, deadline))

    def stream(
        self, *, deadline: float | None = None, resumes: int = 0, request_id: str = "", **asked: Unpack[Asked]
    ) -> Generator[Event, None, None]:
        """As `AsyncMesh.stream`; closing the generator cancels the generation."""
        events = self._mesh.stream(deadline=deadline, resumes=resumes, request_id=request_id, **asked)
        turn = asyncio.Lock()  # a step that Ctrl-C left behind is still being cancelled when the end comes
        try:
            while (event := self._wait(_next(events, turn))) is not None:
                yield event
        finally:
            self._wait(_end(events, turn))

    def generate(self, *, deadline: float | None = None, request_id: str = "", **asked: Unpack[Asked]) -> Answer:
        """As `AsyncMesh.generate`."""
        return self._wait(self._mesh.generate(deadline=deadline, request_id=request_id, **asked))

    def list_models(self, *, deadline: float | None = None) -> Sequence[inference_pb2.Model]:
        """As `AsyncMesh.list_models`."""
        return self._wait(self._mesh.list_models(deadline=deadline))

    def count_tokens(
        self,
        *,
        messages: Sequence[Turn] | None = None,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        deadline: float | None = None,
    ) -> int:
        """As `AsyncMesh.count_tokens`."""
        return self._wait(
            self._mesh.count_tokens(
                messages=messages, prompt=prompt, token_ids=token_ids, model=model, deadline=deadline
            )
        )

    def explain(self, *, deadline: float | None = None, **asked: Unpack[Asked]) -> inference_pb2.ExplainRouteResponse:
        """As `AsyncMesh.explain`."""
        return self._wait(self._mesh.explain(deadline=deadline, **asked))

    def close(self) -> None:
        """Close the connection and end the thread."""
        if self._loop.is_closed():
            return
        self._wait(self._mesh.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # a KeyboardInterrupt in the caller's thread must not leave the call running
            future.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        self.close()


async def _opened(target: str, key: str, deadline: float | None) -> AsyncMesh:
    return AsyncMesh(target, key=key, deadline=deadline)  # a channel belongs to the loop that opens it


async def _next(events: AsyncGenerator[Event, None], turn: asyncio.Lock) -> Event | None:
    async with turn:
        return await anext(events, None)


async def _end(events: AsyncGenerator[Event, None], turn: asyncio.Lock) -> None:
    async with turn:
        await events.aclose()


def _pin(wanted: generation_pb2.Generation, routing: inference_pb2.RoutingDecision) -> None:
    """Ask from now on for what answered: an alias or a route may not lead to it again."""
    wanted.model = routing.model
    for name in ("temperature", "top_p"):
        if routing.HasField(name):
            setattr(wanted.sampling, name, getattr(routing, name))


def _left(ends_at: float | None) -> float | None:
    return None if ends_at is None else max(0.0, ends_at - time.monotonic())


__all__ = ["Answer", "AsyncMesh", "End", "Event", "Mesh", "MeshError", "Moderated", "Reason", "Start", "Text"]
