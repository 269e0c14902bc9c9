"""Answers and flights in Redis or Valkey. Every multi-step change is one Lua script."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, cast

import structlog
from google.protobuf.message import DecodeError
from redis.exceptions import RedisError

from meshlm.cache.key import Key
from meshlm.chassis import telemetry
from meshlm.chassis.breaker import Breaker
from meshlm.chassis.config import StateConfig
from meshlm.chassis.state import connect
from meshlm.chassis.telemetry import Name
from meshlm.v1 import cache_pb2

log = structlog.get_logger()

# An answer, or the lead, or nothing. ARGV: flight id, lease in ms, "1" to take the lead whatever there is.
_FIND_OR_LEAD = """
if ARGV[3] == "1" then
  redis.call("SET", KEYS[2], ARGV[1], "PX", ARGV[2])
  return {"lead"}
end
local answer = redis.call("GET", KEYS[1])
if answer then return {"hit", answer} end
if redis.call("SET", KEYS[2], ARGV[1], "NX", "PX", ARGV[2]) then return {"lead"} end
return {"wait"}
"""

# Keep the answer and end the flight, if it is the caller's; or if it has expired and nobody took over since,
# for an answer may take longer than a lease. ARGV: flight id, TTL in ms, answer.
_STORE = """
local holder = redis.call("GET", KEYS[2])
if holder ~= ARGV[1] and (holder or redis.call("EXISTS", KEYS[1]) == 1) then return 0 end
redis.call("SET", KEYS[1], ARGV[3], "PX", ARGV[2])
redis.call("DEL", KEYS[2])
return 1
"""

# End the flight, if it is still the caller's. ARGV: flight id.
_RELEASE = """
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call("DEL", KEYS[1])
"""

_MAGIC = b"a1"  # before each stored answer, then its CRC-32


class StoreLostError(Exception):
    """Redis is down or slow."""


class Found:
    """What a lookup met: an answer, or the lead, or (neither) another's flight."""

    def __init__(self, answer: cache_pb2.CachedAnswer | None = None, *, lead: bool = False) -> None:
        self.answer = answer
        self.lead = lead


class Store:
    """The store. Every method raises StoreLostError within the state timeout where Redis cannot be had."""

    def __init__(self, state: StateConfig, retry_seconds: float) -> None:
        self._timeout = state.timeout_seconds
        self.breaker = Breaker(1, retry_seconds)  # whoever means to go on without asks it before
        self._redis = connect(state)
        self._find = self._redis.register_script(_FIND_OR_LEAD)
        self._store = self._redis.register_script(_STORE)
        self._release = self._redis.register_script(_RELEASE)
        self._failures = telemetry.meter().create_counter(
            Name.CACHE_STATE_FAILURES, "1", "Commands to Redis that failed"
        )

    async def find_or_lead(self, key: Key, flight: str, lease: float, *, refresh: bool = False) -> Found:
        """The answer; or the lead, held by `flight` for `lease` seconds; or neither. Corrupt answers are deleted."""
        while True:
            names = [key.answer_name, key.flight_name]
            async with self._asking():
                reply = await self._find(names, [flight, _milliseconds(lease), "1" if refresh else "0"])
            if reply[0] != b"hit":
                return Found(lead=reply[0] == b"lead")
            answer = _unpack(reply[1])
            if answer is not None:
                return Found(answer)
            log.warning("a stored answer is corrupt and was deleted")
            async with self._asking():
                await self._redis.delete(key.answer_name)

    async def store(self, key: Key, flight: str, answer: cache_pb2.CachedAnswer, ttl: float) -> bool:
        """Keep the answer for `ttl` seconds and end the flight; False if another has taken it over."""
        async with self._asking():
            kept = await self._store([key.answer_name, key.flight_name], [flight, _milliseconds(ttl), _pack(answer)])
        return bool(kept)

    async def release(self, key: Key, flight: str) -> None:
        """End the flight, if it is the caller's."""
        async with self._asking():
            await self._release([key.flight_name], [flight])

    async def close(self) -> None:
        await self._redis.aclose()

    async def ping(self) -> None:
        async with self._asking():
            await cast(Awaitable[Any], self._redis.ping())

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            self._failures.add(1)
            if not self.breaker.open:
                log.warning("the store is lost: lookups are misses", error=type(error).__name__)
            self.breaker.fail()
            raise StoreLostError from None
        except BaseException:
            self.breaker.leave()
            raise
        if self.breaker.open:
            log.info("the store is back")
        self.breaker.succeed()


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _pack(answer: cache_pb2.CachedAnswer) -> bytes:
    content = answer.SerializeToString()
    return _MAGIC + zlib.crc32(content).to_bytes(4, "big") + content


def _unpack(stored: bytes) -> cache_pb2.CachedAnswer | None:
    """None for what no writer of this version stored."""
    content = stored[6:]
    if stored[:2] != _MAGIC or stored[2:6] != zlib.crc32(content).to_bytes(4, "big"):
        return None
    try:
        return cache_pb2.CachedAnswer.FromString(content)
    except DecodeError:
        return None
