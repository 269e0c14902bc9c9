"""Stage 2's second half: limits a key, reserved before anything is spent and settled with what was used.

GCRA (generic cell rate algorithm, ITU-T I.371): one number a limit, the theoretical arrival time. Reserving adds the
cost times the emission interval; settling adds the difference to what was used, which gives back or charges the rest.
All in Redis' own time and in one Lua script, so any number of routers keep one account. While Redis does not answer,
each router grants a share of the limits by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig

log = structlog.get_logger()

_MINUTE_US = 60_000_000
# A ledger that failed is left alone this long, so that its timeout is not paid by every request, seconds.
_PAUSE = 1.0

# KEYS: requests' arrival time, tokens' arrival time, reservation.
# ARGV: emission of a request (us; 0: no limit), of a token (us, may be fractional; 0: no limit), tokens, ttl (ms).
# Returns {outcome, wait (us), requests left, tokens left}; outcomes: 1 reserved, 0 over a limit (wait tells how long),
# 2 was reserved already. Times are integers of 16 digits: they are written with %.0f, for Lua prints only 14.
_RESERVE = """
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
if redis.call('EXISTS', KEYS[3]) == 1 then return {2, 0, -1, -1} end
local costs = {1, tonumber(ARGV[3])}
local new, wait, left = {}, 0, {-1, -1}
for i = 1, 2 do
  local emission = tonumber(ARGV[i])
  if emission > 0 then
    local tat = math.max(tonumber(redis.call('GET', KEYS[i]) or '0'), now)
    new[i] = tat + costs[i] * emission
    wait = math.max(wait, new[i] - now - 60000000)
    left[i] = math.floor((now + 60000000 - new[i]) / emission + 0.5)
  end
end
if wait > 0 then return {0, math.ceil(wait), -1, -1} end
for i = 1, 2 do
  if new[i] then
    redis.call('SET', KEYS[i], string.format('%.0f', new[i]), 'PX', math.ceil((new[i] - now) / 1000) + 1000)
  end
end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
return {1, 0, left[1], left[2]}
"""

# KEYS as above; ARGV: emission of a token (us), tokens used. Returns 1, or 0 where there is no such reservation
# (settled already, or expired): then the reservation's charge stays as it is.
_SETTLE = """
local reserved = redis.call('GETDEL', KEYS[3])
if not reserved then return 0 end
local emission = tonumber(ARGV[1])
if emission == 0 then return 1 end
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local tat = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), now)
local new = tat + (tonumber(ARGV[2]) - tonumber(reserved)) * emission
if new <= now then redis.call('DEL', KEYS[2])
else redis.call('SET', KEYS[2], string.format('%.0f', new), 'PX', math.ceil((new - now) / 1000) + 1000) end
return 1
"""


@dataclass(frozen=True)
class Reservation:
    id: str
    key: KeyConfig
    tokens: int
    mode: str  # `shared` in Redis, `emergency` by this router alone, `unlimited`
    requests_left: int | None = None
    tokens_left: int | None = None


class Ledger:
    def __init__(
        self,
        redis: Redis | None,
        *,
        reservation_seconds: float,
        emergency_share: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._expiry_ms = round(reservation_seconds * 1000)
        self._emergency = _LocalLimits(emergency_share, clock)
        self._clock = clock
        self._paused_until = 0.0
        self._reserve = redis.register_script(_RESERVE) if redis is not None else None
        self._settle = redis.register_script(_SETTLE) if redis is not None else None

    async def reserve(self, identifier: str, key: KeyConfig, tokens: int) -> Reservation:
        """Take one request and `tokens` from the key's limits.

        Raises MeshError RATE_LIMITED, with the time to wait, or without one where it can never pass.
        """
        if not key.requests_per_minute and not key.tokens_per_minute:
            return Reservation(identifier, key, tokens, "unlimited")
        if key.tokens_per_minute and tokens > key.tokens_per_minute:
            raise MeshError(
                Reason.RATE_LIMITED,
                f"the request may take {tokens} tokens, more than the {key.tokens_per_minute} of a whole minute; "
                "lower max_tokens",
                metadata={"limit": "tokens_per_minute", "permanent": "true"},
            )
        if self._reserve is not None and self._clock() >= self._paused_until:
            try:
                return await self._reserve_shared(identifier, key, tokens)
            except (RedisError, OSError, TimeoutError):
                self._pause()
        self._emergency.take(key, tokens)
        return Reservation(identifier, key, tokens, "emergency")

    async def settle(self, reservation: Reservation, tokens: int) -> bool:
        """Replace what was reserved by what was used. Idempotent. False where the ledger did not take it."""
        if reservation.mode == "unlimited":
            return True
        if reservation.mode == "emergency":
            self._emergency.give_back(reservation.key, reservation.tokens - tokens)
            return True
        assert self._settle is not None  # noqa: S101  a shared reservation came from there
        try:
            keys = _keys(reservation.key, reservation.id)
            return bool(await self._settle(keys=keys, args=[_token_emission(reservation.key), tokens]))
        except (RedisError, OSError, TimeoutError):
            self._pause()
            return False

    async def _reserve_shared(self, identifier: str, key: KeyConfig, tokens: int) -> Reservation:
        assert self._reserve is not None  # noqa: S101
        requests = _MINUTE_US / key.requests_per_minute if key.requests_per_minute else 0
        outcome, wait, requests_left, tokens_left = await self._reserve(
            keys=_keys(key, identifier), args=[requests, _token_emission(key), tokens, self._expiry_ms]
        )
        if outcome == 0:
            raise _limited(wait / 1e6)
        return Reservation(
            identifier,
            key,
            tokens,
            "shared",
            requests_left if requests_left >= 0 else None,
            tokens_left if tokens_left >= 0 else None,
        )

    def _pause(self) -> None:
        if self._clock() >= self._paused_until + _PAUSE:
            log.warning("the ledger does not answer: emergency limits are in force", exc_info=True)
        self._paused_until = self._clock() + _PAUSE


class _LocalLimits:
    """GCRA in this process, at a share of each limit."""

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self._share = share
        self._clock = clock
        self._arrival: dict[tuple[str, str], float] = {}  # theoretical arrival time, seconds of the clock

    def take(self, key: KeyConfig, tokens: int) -> None:
        now = self._clock()
        costs = (("requests", key.requests_per_minute, 1), ("tokens", key.tokens_per_minute, tokens))
        planned = {}
        for name, limit, cost in costs:
            if limit:
                arrival = max(self._arrival.get((key.id, name), 0.0), now) + cost * 60 / (limit * self._share)
                # What alone is more than the share still passes when nothing else is in the way.
                burst = max(60.0, cost * 60 / (limit * self._share))
                if arrival - now > burst + 1e-9:
                    raise _limited(arrival - now - burst)
                planned[key.id, name] = arrival
        self._arrival.update(planned)

    def give_back(self, key: KeyConfig, tokens: int) -> None:
        if key.tokens_per_minute and (key.id, "tokens") in self._arrival:
            self._arrival[key.id, "tokens"] -= tokens * 60 / (key.tokens_per_minute * self._share)


def _limited(seconds: float) -> MeshError:
    return MeshError(Reason.RATE_LIMITED, "the key's limit is reached", retry_after=seconds)


def _token_emission(key: KeyConfig) -> float:
    return _MINUTE_US / key.tokens_per_minute if key.tokens_per_minute else 0


def _keys(key: KeyConfig, reservation: str) -> list[str]:
    tag = f"meshlm:{{{key.tenant}/{key.id}}}"  # one hash slot, so that a cluster can run the script
    return [f"{tag}:requests", f"{tag}:tokens", f"{tag}:reservation:{reservation}"]
