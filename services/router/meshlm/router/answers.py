"""Stage 3, look up: answers already given. Whatever fails here is a miss."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from meshlm.chassis.breaker import Breaker
from meshlm.chassis.calls import outgoing_metadata
from meshlm.chassis.channels import open_channel
from meshlm.chassis.telemetry import Name, client_span
from meshlm.chassis.validation import is_deterministic
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.v1 import cache_pb2, cache_pb2_grpc
from meshlm.v1 import generation_pb2 as pb

log = structlog.get_logger()

_SERVICE = "meshlm.v1.CacheService"


@dataclass
class Lookup:
    """What the cache said. A flight that this request leads must end in `Answers.keep` or `Answers.release`."""

    outcome: str = "bypass"  # hit, shared, lead, timeout, bypass (not asked), region (it lies elsewhere) or unavailable
    answer: cache_pb2.CachedAnswer | None = None
    key: str = ""
    flight: str = ""
    revision: str = ""  # weights that were asked for


class Answers:
    def __init__(self, config: RouterConfig) -> None:
        self._channel = open_channel(config.cache) if config.cache else None
        self._stub: Any = cache_pb2_grpc.CacheServiceStub(self._channel) if self._channel is not None else None
        self._seconds = config.cache_seconds
        self._wait = config.shared_flight_seconds
        # A cache that does not answer is asked by one request at a time, so that not each pays the time-out.
        self._breaker = Breaker(1 if config.cache_retry_seconds else 0, config.cache_retry_seconds)
        self._leaving: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving)
        if self._channel is not None:
            await self._channel.close()

    def asks(self, generation: pb.Generation) -> bool:
        """Whether an answer to it may be there."""
        return self._stub is not None and _eligible(generation)

    async def look_up(
        self,
        request_id: str,
        key: KeyConfig,
        generation: pb.Generation,
        revision: str,
        wording: str = "",
        *,
        seconds_left: float,
        refresh: bool = False,
    ) -> Lookup:
        """Find an answer, wait for one in flight (within `seconds_left`), or take the lead."""
        if not self.asks(generation):
            return Lookup()
        request = cache_pb2.LookUpRequest(
            request_id=request_id,
            tenant=key.tenant,
            generation=generation,
            model_revision=revision,
            policy=key.guard_policy,
            allow_control_tokens=key.raw_prompts,
            wording=wording,
            refresh=refresh or generation.cache_policy == pb.CACHE_POLICY_REFRESH,
        )
        with client_span(_SERVICE, "LookUp") as span:
            lookup = await self._ask_at_once(request, min(self._seconds, seconds_left))
            if lookup.outcome == "timeout" and self._wait:
                # Another's flight. Only now is it worth waiting: a cache that hangs must not cost that long.
                request.wait_seconds = self._wait
                lookup = await self._ask(request, min(self._seconds + self._wait, seconds_left))
            span.set_attribute(Name.CACHE_OUTCOME, lookup.outcome)
        return lookup

    async def _ask_at_once(self, request: cache_pb2.LookUpRequest, seconds: float) -> Lookup:
        """As `_ask`, of a question that the cache answers without waiting. Where the request leaves meanwhile, the lead
        that it may have got by then is given back: it would hold up whoever asks the same, until its lease ends."""
        asking = asyncio.ensure_future(self._ask(request, seconds))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._do_beside(self._give_back(asking))
            raise

    def _do_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """What no request waits for."""
        task = asyncio.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _give_back(self, asking: asyncio.Future[Lookup]) -> None:
        await self.release(await asking)

    async def _ask(self, request: cache_pb2.LookUpRequest, timeout: float) -> Lookup:  # noqa: ASYNC109  gRPC's own
        if not self._breaker.allows():
            return Lookup("unavailable")
        try:
            found = await self._stub.LookUp(request, timeout=timeout, metadata=outgoing_metadata())
        except grpc.RpcError as error:
            self._note_failure(error, waited=timeout >= self._seconds)
            log.warning("the cache does not answer", code=error.code().name)
            return Lookup("unavailable")
        except BaseException:
            self._breaker.leave()
            raise
        self._breaker.succeed()
        outcome = _OUTCOMES.get(found.outcome, "unavailable")
        answer = found.answer if outcome in ("hit", "shared") else None
        return Lookup(outcome, answer, found.key, found.flight, request.model_revision)

    def _note_failure(self, error: grpc.RpcError, *, waited: bool) -> None:
        """`waited`: the cache had all of its time, and not only what was left of a caller's."""
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if error.code() == grpc.StatusCode.UNAVAILABLE or (late and waited):
            self._breaker.fail()
        else:
            self._breaker.leave()

    async def keep(self, lookup: Lookup, answer: cache_pb2.CachedAnswer) -> None:
        """Store the answer of a flight this request leads."""
        await self._finish(self._keep(lookup, answer))

    async def release(self, lookup: Lookup) -> None:
        """End a flight without an answer, so that whoever waits goes on."""
        await self._finish(self._release(lookup))

    async def _finish(self, ending: Coroutine[Any, Any, None]) -> None:
        """Of a flight. No request waits for a cache that does not answer."""
        if self._breaker.open:
            self._do_beside(ending)
        else:
            await ending

    async def _keep(self, lookup: Lookup, answer: cache_pb2.CachedAnswer) -> None:
        request = cache_pb2.StoreRequest(key=lookup.key, flight=lookup.flight, answer=answer)
        if not await self._end("Store", request, lookup.flight):
            await self.release(lookup)  # too large to be sent, perhaps: whoever waits must not wait for it

    async def _release(self, lookup: Lookup) -> None:
        await self._end("Release", cache_pb2.ReleaseRequest(key=lookup.key, flight=lookup.flight), lookup.flight)

    async def _end(self, method: str, request: Any, flight: str) -> bool:
        """Whether the cache heard it."""
        if self._stub is None or not flight:
            return True
        with client_span(_SERVICE, method):
            try:
                await getattr(self._stub, method)(request, timeout=self._seconds, metadata=outgoing_metadata())
            except grpc.RpcError as error:
                self._note_failure(error, waited=True)
                log.warning("a flight could not be ended", method=method, code=error.code().name)
                return False
        self._breaker.succeed()
        return True


def _eligible(generation: pb.Generation) -> bool:
    policy = generation.cache_policy
    if policy == pb.CACHE_POLICY_BYPASS:
        return False
    return policy == pb.CACHE_POLICY_ALWAYS or is_deterministic(generation.sampling)


_OUTCOMES = {
    cache_pb2.LOOK_UP_OUTCOME_HIT: "hit",
    cache_pb2.LOOK_UP_OUTCOME_SHARED: "shared",
    cache_pb2.LOOK_UP_OUTCOME_LEAD: "lead",
    cache_pb2.LOOK_UP_OUTCOME_TIMEOUT: "timeout",
}
