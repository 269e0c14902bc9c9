"""The gRPC side of the cache. Failures of the store are answers here (UNSPECIFIED, stored = false), never errors."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress

import grpc
from opentelemetry import trace

from meshlm.cache.config import CacheConfig
from meshlm.cache.flight import Flights, Landing, Outcome
from meshlm.cache.key import Key, derive
from meshlm.cache.store import Store, StoreLostError
from meshlm.chassis import telemetry
from meshlm.chassis.calls import seconds_left
from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import invalid
from meshlm.chassis.life import Life
from meshlm.chassis.telemetry import Name
from meshlm.v1 import cache_pb2, cache_pb2_grpc

# Left of the caller's deadline when a wait gives up, as a share and seconds: an answer that says TIMEOUT must arrive.
_MARGIN_SHARE = 0.05
_LEAST_MARGIN = 0.05
_MOST_MARGIN = 0.5

_WIRE = {
    Outcome.HIT: cache_pb2.LOOK_UP_OUTCOME_HIT,
    Outcome.SHARED: cache_pb2.LOOK_UP_OUTCOME_SHARED,
    Outcome.LEAD: cache_pb2.LOOK_UP_OUTCOME_LEAD,
    Outcome.TIMEOUT: cache_pb2.LOOK_UP_OUTCOME_TIMEOUT,
}


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """CacheService over a Store."""

    name = "cache"
    background_methods: frozenset[str] = frozenset()

    def __init__(self, config: CacheConfig, state: StateConfig) -> None:
        self._config = config
        self._store = Store(state, config.retry_seconds)
        self._flights = Flights(self._store, lease_seconds=config.lease_seconds, ttl_seconds=config.ttl_seconds)
        self._lookups = telemetry.meter().create_counter(Name.CACHE_LOOKUPS, "1", "Lookups by outcome")
        self._stores = telemetry.meter().create_counter(Name.CACHE_STORES, "1", "Answers offered, by result")
        self._seconds = telemetry.meter().create_histogram(Name.CACHE_DURATION, "s", "Duration of lookups")

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        cache_pb2_grpc.add_CacheServiceServicer_to_server(self, server)
        return [cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name]

    async def start(self, life: Life) -> None:
        """Serves with or without Redis: without it, everything is a miss."""
        try:
            await self._store.ping()
        except StoreLostError:
            return

    async def drain(self) -> None:
        """Lookups that wait for another's flight end now, as if their wait had."""
        self._flights.drain()

    async def stop(self) -> None:
        await self._flights.close()
        await self._store.close()

    async def LookUp(
        self, request: cache_pb2.LookUpRequest, context: grpc.aio.ServicerContext
    ) -> cache_pb2.LookUpResponse:
        begun = time.perf_counter()
        key = derive(
            request.tenant,
            request.generation,
            request.model_revision,
            request.policy,
            control_tokens=request.allow_control_tokens,
            wording=request.wording,
        )
        wait = self._wait(request.wait_seconds, seconds_left(context))
        landing = await self._look_up(key, wait, refresh=request.refresh)
        outcome = str(landing.outcome) if landing is not None else "unavailable"
        trace.get_current_span().set_attribute(Name.CACHE_OUTCOME, outcome)
        self._lookups.add(1, {Name.CACHE_OUTCOME: outcome})
        self._seconds.record(time.perf_counter() - begun, {Name.CACHE_OUTCOME: outcome})
        if landing is None:
            return cache_pb2.LookUpResponse()
        if landing.outcome is Outcome.LEAD:
            self._watch(context, key, landing.flight)
            return cache_pb2.LookUpResponse(outcome=_WIRE[Outcome.LEAD], key=str(key), flight=landing.flight)
        return cache_pb2.LookUpResponse(outcome=_WIRE[landing.outcome], answer=landing.answer)

    async def Store(
        self, request: cache_pb2.StoreRequest, context: grpc.aio.ServicerContext
    ) -> cache_pb2.StoreResponse:
        key, flight = _flight(request.key, request.flight)
        answer = request.answer
        answer.stored_at = time.time()
        too_large = answer.ByteSize() > self._config.max_answer_bytes
        try:
            if too_large:
                await self._flights.release(key, flight)
                stored = False
            else:
                stored = await self._flights.land(key, flight, answer)
            result = "stored" if stored else "too_large" if too_large else "expired"
        except StoreLostError:
            stored, result = False, "unavailable"
        self._stores.add(1, {Name.CACHE_OUTCOME: result})
        return cache_pb2.StoreResponse(stored=stored)

    async def Release(
        self, request: cache_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> cache_pb2.ReleaseResponse:
        key, flight = _flight(request.key, request.flight)
        with suppress(StoreLostError):  # without the store, its lease ends the flight
            await self._flights.release(key, flight)
        return cache_pb2.ReleaseResponse()

    async def _look_up(self, key: Key, wait: float, *, refresh: bool) -> Landing | None:
        """None where the store cannot be had."""
        if not self._store.breaker.allows():
            return None
        try:
            return await self._flights.look_up(key, wait=wait, refresh=refresh)
        except StoreLostError:
            return None

    def _wait(self, asked: float, left: float | None) -> float:
        if math.isnan(asked) or asked < 0:
            raise invalid("wait_seconds", "must not be negative")
        wait = min(asked, self._config.max_wait_seconds)
        if left is None:
            return wait
        margin = min(max(_LEAST_MARGIN, _MARGIN_SHARE * left), _MOST_MARGIN)
        return max(0.0, min(wait, left - margin))

    def _watch(self, context: grpc.aio.ServicerContext, key: Key, flight: str) -> None:
        """A lead that was won, but whose caller left before it arrived, is given back."""

        def ended(call: grpc.aio.ServicerContext) -> None:
            # `done` tells that the answer was sent; `cancelled` stays False in grpc.aio for a cancelled call.
            if not call.done():
                self._flights.give_back(key, flight)

        context.add_done_callback(ended)


def _flight(key: str, flight: str) -> tuple[Key, str]:
    if not flight:
        raise invalid("flight", "required")
    return Key.parse(key), flight
