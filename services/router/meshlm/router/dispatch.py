"""From a choice of replicas to a running generation on one of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.telemetry import Name, fail, tracer
from meshlm.router.fleet import Fleet, Replica
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()

_SERVICE = "meshlm.v1.WorkerService"
# Before anything was computed, another replica may do better.
_ELSEWHERE = frozenset({Reason.OVERLOADED, Reason.DRAINING, Reason.NO_REPLICA, Reason.ENGINE_LOST})


class WorkerCall:
    """A generation that a worker accepted."""

    def __init__(self, call: Any, span: Span) -> None:
        self._call = call
        self._span = span

    async def messages(self) -> AsyncIterator[worker_pb2.RunGenerationResponse]:
        """Everything after the acceptance. Raises MeshError."""
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                yield message
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            fail(self._span, failure.reason)
            raise failure from None

    async def close(self, work: Work) -> None:
        """Cancel what still runs; the worker frees its memory within a step."""
        self._call.cancel()
        self._span.set_attribute(Name.INPUT_TOKENS, work.usage.prompt_tokens)
        self._span.set_attribute(Name.CACHED_TOKENS, work.usage.cached_prompt_tokens)
        self._span.set_attribute(Name.OUTPUT_TOKENS, work.usage.completion_tokens)
        self._span.end()
        with contextlib.suppress(grpc.RpcError):
            await self._call.code()


async def dispatch(work: Work, fleet: Fleet) -> WorkerCall:
    """Give the request to the least-loaded replica; if that one cannot take it, to the next.

    Sets `work.replica`, the prompt's usage and the answer's limit. Raises MeshError: the last replica's.
    """
    work.choice = fleet.choose(work.generation.model)  # anew: loads have moved while the cache was asked
    failure = MeshError(Reason.NO_REPLICA, "no replica of this model is ready", retry_after=1.0)
    for replica in work.choice.replicas:
        try:
            return await _offer(work, replica)
        except MeshError as error:
            if error.reason not in _ELSEWHERE:
                raise
            log.info("replica refused", replica=replica.name, reason=error.reason)
            failure = error
    raise failure


async def _offer(work: Work, replica: Replica) -> WorkerCall:
    attributes = {
        Name.RPC_SYSTEM: "grpc",
        Name.RPC_SERVICE: _SERVICE,
        Name.RPC_METHOD: "RunGeneration",
        Name.REPLICA: replica.name,
    }
    span = tracer().start_span(f"{_SERVICE}/RunGeneration", kind=SpanKind.CLIENT, attributes=attributes)
    request = worker_pb2.RunGenerationRequest(
        request_id=work.request_id,
        generation=work.generation,
        cache_salt=work.cache_salt,
        resume_from=work.resume_from,
        allow_control_tokens=work.key.raw_prompts,
        tenant=work.key.tenant,
    )
    with trace.use_span(span, end_on_exit=False):
        call = replica.stub.RunGeneration(request, timeout=work.seconds_left(), metadata=outgoing_metadata())
    replica.note_sent()
    taken = False
    try:
        first = await call.read()
        if first is grpc.aio.EOF:
            raise MeshError(Reason.INTERNAL, "a worker accepted and said nothing")
        taken = True
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        if not taken:
            call.cancel()
            fail(span, "refused")
            span.end()
    work.replica = replica
    work.usage = first.usage or pb.Usage()
    work.completion_limit = first.accepted.max_tokens
    return WorkerCall(call, span)


async def token_text(work: Work) -> str:
    """The text of an input given as token ids, from a worker's tokenizer; empty for other inputs. Raises MeshError."""
    if work.generation.input.WhichOneof("input") != "token_ids":
        return ""
    assert work.choice is not None  # noqa: S101
    request = worker_pb2.CountInputTokensRequest(input=work.generation.input)
    stub = work.choice.replicas[0].stub
    try:
        counted = await stub.CountInputTokens(request, timeout=work.seconds_left(), metadata=outgoing_metadata())
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    text: str = counted.token_text
    return text
