"""What surrounds every call on a server: its ids, its span, its metrics, the gate while draining, and its errors."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from opentelemetry import context as otel_context
from opentelemetry.trace import SpanKind

from meshlm.chassis import telemetry
from meshlm.chassis.errors import DETAILS_KEY, MeshError, Reason, from_rpc_error, status_details
from meshlm.chassis.telemetry import Name

log = structlog.get_logger()

REQUEST_ID_KEY = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_Reader = Callable[[Any], Any]
_Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
_UNTRACED = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.")


class Gate:
    """Counts calls in flight, and turns new ones away once it is closed."""

    def __init__(self, background: frozenset[str] = frozenset()) -> None:
        self._background = background  # full method names of streams that never end by themselves
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closed = False

    @contextmanager
    def passing(self, method: str) -> Iterator[None]:
        """Around a call. Raises MeshError DRAINING once closed."""
        if method in self._background:
            yield
            return
        if self.closed:
            raise MeshError(Reason.DRAINING, "this instance ends; another will answer", retry_after=0.1)
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    @property
    def running(self) -> int:
        return self._running

    async def wait_idle(self, seconds: float) -> bool:
        """Whether all calls ended within that time."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The one place where a Python exception becomes a gRPC status."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._seconds = telemetry.meter().create_histogram("rpc.server.duration", "s", "Duration of calls")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_UNTRACED):
            return handler
        kind = handler.request_streaming, handler.response_streaming
        inner, make = _INNER[kind](handler), _FACTORIES[kind]
        # grpc.aio answers bytes it cannot parse with UNKNOWN and the exception's text: parse inside the boundary.
        read = _reader(handler.request_deserializer, handler.request_streaming)
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        return make(wrap(details.method, inner, read), None, handler.response_serializer)

    def _wrap_unary(self, method: str, inner: Callable[..., Awaitable[Any]], read: _Reader) -> _Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with _Boundary(self, method, context):
                return await inner(read(request), context)

        return call

    def _wrap_stream(self, method: str, inner: Callable[..., Any], read: _Reader) -> _Behaviour:
        # Written with context.write, not as a generator: a cancel must reach the handler's finally at once.
        async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with _Boundary(self, method, context), aclosing(inner(read(request), context)) as messages:
                async for message in messages:
                    await _write(context, message)

        return call

    def observe(self, method: str, code: str, seconds: float) -> None:
        self._seconds.record(seconds, {Name.RPC_METHOD: method, Name.RPC_STATUS: code})

    @property
    def gate(self) -> Gate:
        return self._gate


async def _write(context: grpc.aio.ServicerContext, message: Any) -> None:
    """Raises CancelledError where nobody reads any more: a connection that breaks, or a server that stops, fails a
    write before it cancels the call, and that is no error of ours."""
    try:
        await context.write(message)
    except (grpc.aio.UsageError, grpc.aio.AbortError):
        raise
    except grpc.aio.BaseError:
        log.info("the caller is gone")
        raise asyncio.CancelledError from None


def _reader(parse: Callable[[bytes], Any], streaming: bool) -> _Reader:
    """From what gRPC hands over (bytes, or an iterator of them) to messages. Raises MeshError REQUEST_INVALID."""

    def one(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            raise MeshError(Reason.REQUEST_INVALID, "the message cannot be parsed") from None

    async def many(stream: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for data in stream:
            yield one(data)

    return many if streaming else one


class _Boundary:
    """Around one call: opens its span and binds its ids; on the way out, maps its error and aborts."""

    def __init__(self, interceptor: CallInterceptor, method: str, context: grpc.aio.ServicerContext) -> None:
        self._interceptor = interceptor
        self._method = method
        self._context = context

    async def __aenter__(self) -> None:
        self._start = time.perf_counter()
        metadata = {key: value for key, value in self._context.invocation_metadata() or () if isinstance(value, str)}
        request_id = metadata.get(REQUEST_ID_KEY, "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        structlog.contextvars.bind_contextvars(request_id=request_id)
        self._token = otel_context.attach(telemetry.extract(metadata))
        service, _, name = self._method[1:].partition("/")
        self._span_manager = telemetry.span(
            f"{service}/{name}",
            {
                Name.RPC_SYSTEM: "grpc",
                Name.RPC_SERVICE: service,
                Name.RPC_METHOD: name,
                Name.REQUEST_ID: request_id,
            },
            kind=SpanKind.SERVER,
        )
        self._span = self._span_manager.__enter__()
        self._passing = self._interceptor.gate.passing(self._method)
        try:
            self._passing.__enter__()
        except MeshError as error:
            await self._abort(error)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        self._passing.__exit__(None, None, None)
        if error is None:
            self._close("OK")
        elif isinstance(error, asyncio.CancelledError):
            telemetry.fail(self._span, "CANCELLED")
            self._close("CANCELLED")
        elif isinstance(error, grpc.aio.AbortError):
            self._close("ABORTED")
        else:
            await self._abort(self._mapped(error))

    def _mapped(self, error: BaseException) -> MeshError:
        if isinstance(error, MeshError):
            return error
        if isinstance(error, grpc.RpcError):
            return from_rpc_error(error)
        log.error("unforeseen error", method=self._method, exc_info=error)
        return MeshError(Reason.INTERNAL, "internal error; its text is in the service's log")

    async def _abort(self, error: MeshError) -> None:
        telemetry.fail(self._span, error.reason)
        if error.status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
            log.warning("call failed", method=self._method, reason=error.reason)
        self._close(error.status.name)
        trailers = ((DETAILS_KEY, status_details(error)),)
        await self._context.abort(error.status, error.message, trailers)

    def _close(self, code: str) -> None:
        self._span.set_attribute(Name.RPC_STATUS, code)
        self._span_manager.__exit__(None, None, None)
        otel_context.detach(self._token)
        self._interceptor.observe(self._method, code, time.perf_counter() - self._start)


def request_id() -> str:
    """Id of the call being handled."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def outgoing_metadata() -> list[tuple[str, str]]:
    """Metadata for calls made on behalf of the call being handled: its id and its trace."""
    return telemetry.inject([(REQUEST_ID_KEY, request_id())] if request_id() else [])


def seconds_left(context: grpc.aio.ServicerContext) -> float | None:
    """Until the caller's deadline; None without one."""
    left: float | None = context.time_remaining()
    return left


_FACTORIES = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_INNER: dict[tuple[bool, bool], Callable[[Any], Callable[..., Any]]] = {
    (False, False): lambda handler: handler.unary_unary,
    (False, True): lambda handler: handler.unary_stream,
    (True, False): lambda handler: handler.stream_unary,
    (True, True): lambda handler: handler.stream_stream,
}
