"""Workers that were proven wrong get no requests, from any router, until time or an operator releases them."""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.telemetry import Name, meter
from meshlm.router.replicas.fleet import Fleet

log = structlog.get_logger()

# When each one ends (sorted set: name, ms of the server's time), and why it began (hash).
_UNTIL, _WHY = "meshlm:{quarantine}:until", "meshlm:{quarantine}:why"
_ASK_SECONDS = 1.0
# What ended is dropped first. ARGV: nothing, to read; `add`, name, ms and reason; or `release` and name.
# Returns name, ms left and reason of each, one after the other.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
end
if ARGV[1] == 'add' then
  redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[4])
elseif ARGV[1] == 'release' then
  redis.call('ZREM', KEYS[1], ARGV[2])
  redis.call('HDEL', KEYS[2], ARGV[2])
end
local listed = {}
local found = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #found, 2 do
  listed[#listed + 1] = found[i]
  listed[#listed + 1] = tostring(math.floor(found[i + 1] - now))
  listed[#listed + 1] = redis.call('HGET', KEYS[2], found[i]) or ''
end
return listed
"""


class Register:
    """The shared list."""

    def __init__(self, redis: Redis) -> None:
        self._script = redis.register_script(_SCRIPT)

    async def read(self) -> dict[str, tuple[float, str]]:
        """Seconds left and reason, by the replica's name. Raises RedisError, OSError or TimeoutError, as all here."""
        return await self._run()

    async def add(self, name: str, seconds: float, why: str) -> dict[str, tuple[float, str]]:
        return await self._run("add", name, round(seconds * 1000), why)

    async def release(self, name: str) -> dict[str, tuple[float, str]]:
        return await self._run("release", name)

    async def _run(self, *arguments: str | int) -> dict[str, tuple[float, str]]:
        listed = [part.decode() for part in await self._script(keys=[_UNTIL, _WHY], args=list(arguments))]
        threes = zip(listed[::3], listed[1::3], listed[2::3], strict=True)
        return {name: (int(left) / 1000, why) for name, left, why in threes}


class Quarantine:
    """Keeps the fleet's replicas as the shared list says. While the store does not answer, as it said last."""

    def __init__(self, redis: Redis | None, fleet: Fleet, seconds: float) -> None:
        """`seconds`: how long each one lasts; 0: nobody is put under it."""
        self._register = Register(redis) if redis is not None else None
        self._fleet = fleet
        self._seconds = seconds
        self._following: asyncio.Task[None] | None = None
        self._stopped = False
        self._gauge = meter().create_gauge(Name.ROUTER_QUARANTINED, "1", "1 for a replica that gets no requests")

    def start(self) -> None:
        if self._register is not None:
            self._following = asyncio.create_task(self._follow(self._register))

    async def stop(self) -> None:
        self._stopped = True  # ends it even where the store's client swallows the cancel, as Python 3.11's wait_for may
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following

    async def add(self, name: str, why: str) -> None:
        """Tell all routers; here it holds at once, unless the store does not answer."""
        if self._register is None or not self._seconds:
            return
        try:
            self._apply(await self._register.add(name, self._seconds, why))
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("a quarantine could not be told", replica=name, error=type(error).__name__)

    async def _follow(self, register: Register) -> None:
        while not self._stopped:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                self._apply(await register.read())
            await asyncio.sleep(_ASK_SECONDS)

    def _apply(self, listed: dict[str, tuple[float, str]]) -> None:
        for replica in self._fleet.replicas:
            if replica.state is None:
                continue  # its name is not known; when it is heard again, the next turn finds it
            held = replica.name in listed
            if held != replica.quarantined:
                replica.quarantined = held
                self._gauge.set(int(held), {Name.REPLICA: replica.name})
                log.warning("quarantine begins" if held else "quarantine ends", replica=replica.name)
