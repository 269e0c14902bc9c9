"""From a choice of replicas to a running generation on one of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.telemetry import Name, begin, fail, meter
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload import Overload, urgency_of
from meshlm.router.replicas.replica import Attempt, Replica
from meshlm.router.streams.progress import ask_to_go_on
from meshlm.router.streams.retries import RetryBudget
from meshlm.router.wording import Wording
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

log = structlog.get_logger()

_SERVICE = "meshlm.v1.WorkerService"
# Before anything was computed, another replica may do better.
ELSEWHERE = frozenset({Reason.OVERLOADED, Reason.DRAINING, Reason.NO_REPLICA, Reason.ENGINE_LOST})
_TICK_SECONDS = 0.5
# A worker that cannot be heard, and whose stream says nothing for so long, is gone.
_UNHEARD_SECONDS = 1.5


class WorkerCall:
    """A generation that a worker accepted. One timer finds it silent: a timer a message would cost too much."""

    def __init__(
        self, call: Any, span: Span, attempt: Attempt, accepted: worker_pb2.RunGenerationResponse, wording: Wording
    ) -> None:
        self.replica = attempt.replica
        self._attempt = attempt
        self._wording = wording
        self.usage = accepted.usage
        self.limit = accepted.accepted.max_tokens
        self.idle_seconds = math.inf  # without a message, after which it is given up; a prompt may take any time
        self._call = call
        self._span = span
        self._heard = time.monotonic()
        self._silent = False
        self._closed = False
        self._watch()

    async def read(self) -> worker_pb2.RunGenerationResponse | None:
        """The next message after the acceptance; None after the last. Raises MeshError."""
        try:
            message: worker_pb2.RunGenerationResponse = await self._call.read()
        except grpc.RpcError as error:
            failure = _lost() if error.code() == grpc.StatusCode.CANCELLED else from_rpc_error(error)
            fail(self._span, failure.reason)
            self._attempt.end(failure.reason)
            raise failure from None
        except asyncio.CancelledError:
            if not self._silent:
                raise
            fail(self._span, "silent")
            self._attempt.end(Reason.ENGINE_LOST)
            raise _lost() from None
        self._heard = time.monotonic()
        if message is grpc.aio.EOF:
            return None
        self._attempt.note(message)
        return self._wording.restore(message)

    def _watch(self) -> None:
        """Give the call up once its worker says nothing for too long, or cannot be heard at all."""
        quiet = time.monotonic() - self._heard
        if quiet >= self.idle_seconds or (quiet >= _UNHEARD_SECONDS and self.replica.state is None):
            log.warning("a worker's stream is silent", replica=self.replica.name, seconds=round(quiet, 1))
            self._silent = True
            self._call.cancel()
            return
        self._watching = asyncio.get_running_loop().call_later(_TICK_SECONDS, self._watch)

    async def close(self, usage: pb.Usage) -> None:
        """Cancel what still runs; the worker frees its memory within a step."""
        if self._closed:
            return
        self._closed = True
        self._watching.cancel()
        self._call.cancel()
        self._attempt.end()
        self._span.set_attributes(
            {
                Name.INPUT_TOKENS: usage.prompt_tokens,
                Name.CACHED_TOKENS: usage.cached_prompt_tokens,
                Name.OUTPUT_TOKENS: usage.completion_tokens,
            }
        )
        self._span.end()
        with contextlib.suppress(grpc.RpcError):
            await self._call.code()


def _lost() -> MeshError:
    return MeshError(Reason.ENGINE_LOST, "the worker ended its stream", retry_after=1.0)


class Dispatcher:
    """Gives requests to replicas, within the router's budget for retries."""

    def __init__(self, fleet: Fleet, retries: RetryBudget, overload: Overload) -> None:
        self._fleet = fleet
        self._overload = overload
        self.retries = retries
        self.resumes = meter().create_counter(
            Name.ROUTER_RESUMES, "{resume}", "Streams that went on at another worker, or could not"
        )

    async def first(self, work: Work) -> WorkerCall:
        """Give the request to the best replica, once it has room; if that one cannot take it, to the next.

        Sets `work.choice`, `work.replica`, the prompt's usage and the answer's limit. Raises MeshError: OVERLOADED
        where no replica has room in time, or the last replica's.
        """
        self.retries.note_request()
        wanted, urgency = work.wanted, urgency_of(work.generation.priority)
        try:
            place = await self._overload.enter(
                wanted, urgency, lambda: self._fleet.take(wanted, urgency.share), work.seconds_left()
            )
        except BaseException:
            if work.choice is None:
                with contextlib.suppress(MeshError):
                    work.choice = self._fleet.choose(wanted)  # its record says which model it came to
            raise
        work.choice, attempt = place  # anew: loads have moved where the cache was asked
        try:
            if work.revision not in ("", work.choice.revision):
                raise MeshError(Reason.NO_REPLICA, "no replica has the weights that this stream began with")
            call = await self.offer(work, work.choice.replicas, request_of(work), attempt=attempt)
        except BaseException:
            attempt.end()  # where it was not even sent
            raise
        work.note_replica(call.replica)
        work.usage = call.usage
        work.completion_limit = call.limit
        return call

    def others(self, work: Work, lost: Collection[Replica]) -> list[Replica]:
        """Replicas that can take the request now and have the weights it began with, best first; those that lost it
        before come last. Empty where there is none."""
        assert work.choice is not None  # noqa: S101
        try:
            choice = self._fleet.choose(work.wanted)
        except MeshError:
            return []
        if choice.revision != work.choice.revision:
            return []
        return sorted(choice.replicas, key=lambda replica: replica in lost)

    async def offer(
        self,
        work: Work,
        replicas: Sequence[Replica],
        request: worker_pb2.RunGenerationRequest,
        *,
        attempt: Attempt | None = None,
        free: bool = False,
    ) -> WorkerCall:
        """The first of these replicas that takes it. `attempt`: the place that it has at the first. `free`: however
        many must be tried, the budget is not asked.

        Raises MeshError: the last replica's.
        """
        failure = MeshError(Reason.NO_REPLICA, "no replica of this model is ready", retry_after=1.0)
        for number, replica in enumerate(replicas):
            if number and not free and not self.retries.take("refused"):
                break
            try:
                return await _offer(work, replica, request, attempt if number == 0 else None)
            except MeshError as error:
                if error.reason not in ELSEWHERE:
                    raise
                log.info("replica refused", replica=replica.name, reason=error.reason)
                failure = error
        raise failure


def request_of(work: Work) -> worker_pb2.RunGenerationRequest:
    """What a worker is asked: to begin, or to go on behind what was told. Token ids come back whether the caller wants
    them or not: another worker can go on from them; and a seed goes with what is drawn, so that it goes on with the
    same draws."""
    request = worker_pb2.RunGenerationRequest(
        request_id=work.request_id,
        generation=work.generation,
        cache_salt=work.cache_salt,
        allow_control_tokens=work.key.raw_prompts,
        tenant=work.key.tenant,
    )
    if work.wording().name:
        request.generation.input.CopyFrom(work.wording().source)
    request.generation.return_token_ids = True
    ask_to_go_on(request, work.progress, tuple(work.finishes))
    if (work.proven or work.weighed) and not request.generation.sampling.HasField("logprobs"):
        request.generation.sampling.logprobs = 0
    if (seed := work.seed) is not None:
        request.generation.sampling.seed = seed
    return request


async def _offer(
    work: Work, replica: Replica, request: worker_pb2.RunGenerationRequest, attempt: Attempt | None
) -> WorkerCall:
    assert work.choice is not None  # noqa: S101
    attributes = {
        Name.RPC_SYSTEM: "grpc",
        Name.RPC_SERVICE: _SERVICE,
        Name.RPC_METHOD: "RunGeneration",
        Name.REPLICA: replica.name,
    }
    span = begin(f"{_SERVICE}/RunGeneration", attributes, kind=SpanKind.CLIENT)
    with trace.use_span(span, end_on_exit=False):
        sent = [request.SerializeToString()]
        call = replica.run(sent, timeout=work.seconds_left(), metadata=outgoing_metadata())
    attempt = attempt or replica.begin(work.prefix, max(0, work.measure.tokens - work.choice.cached(replica)))
    taken, reason = False, None
    try:
        first = await call.read()
        if first is grpc.aio.EOF:
            raise MeshError(Reason.INTERNAL, "a worker accepted and said nothing")
        taken = True
    except grpc.RpcError as error:
        failure = from_rpc_error(error)
        reason = failure.reason
        raise failure from None
    finally:
        if not taken:
            call.cancel()
            attempt.end(reason)
            fail(span, "refused")
            span.end()
    return WorkerCall(call, span, attempt, first, work.wording())


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
