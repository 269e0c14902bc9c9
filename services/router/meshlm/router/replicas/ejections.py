"""Outliers that several routers found are left out by all of them. docs/decisions/0019 says why one is not enough."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.config import ServerConfig
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.replica import Replica

log = structlog.get_logger()

# Which router ejected which replica (sorted set: model, replica and router; ms of the server's time when that ends),
# and which of them all leave out (the same without the router).
_VOTES, _SHARED = "meshlm:{ejections}:votes", "meshlm:{ejections}:shared"
_ASK_SECONDS = 1.0
# What ended is dropped first. ARGV: nothing, to read; or model, replica, router, ms, routers needed, replicas of the
# model, and the largest share of them.
# All leave a replica out for as long as the routers needed do, unless that would be more than the share, or the last.
# Returns model, replica and ms left of each that all leave out, one after the other.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if ARGV[1] then
  local line = ARGV[1] .. '\\n'
  local place = line .. ARGV[2]
  redis.call('ZADD', KEYS[1], now + ARGV[4], place .. '\\n' .. ARGV[3])
  local votes = redis.call('ZREVRANGE', KEYS[1], 0, -1, 'WITHSCORES')
  local agreed, ends = 0, 0
  for i = 1, #votes, 2 do
    if string.sub(votes[i], 1, #place + 1) == place .. '\\n' then
      agreed = agreed + 1
      if agreed == tonumber(ARGV[5]) then ends = votes[i + 1] end
    end
  end
  local others, replicas = 0, tonumber(ARGV[6])
  for _, out in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if out ~= place and string.sub(out, 1, #line) == line then others = others + 1 end
  end
  if ends ~= 0 and others + 1 < replicas and (others + 1) / replicas <= tonumber(ARGV[7]) then
    redis.call('ZADD', KEYS[2], ends, place)
  end
end
local listed = {}
local found = redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
for i = 1, #found, 2 do
  local cut = string.find(found[i], '\\n', 1, true)
  listed[#listed + 1] = string.sub(found[i], 1, cut - 1)
  listed[#listed + 1] = string.sub(found[i], cut + 1)
  listed[#listed + 1] = tostring(math.floor(found[i + 1] - now))
end
return listed
"""


class Ballot:
    """The shared votes. Raises RedisError, OSError or TimeoutError."""

    def __init__(self, redis: Redis, router: str, needed: int) -> None:
        """`needed`: routers that must have ejected a replica for all to leave it out."""
        self._script = redis.register_script(_SCRIPT)
        self._router = router
        self._needed = needed

    async def read(self) -> dict[tuple[str, str], float]:
        """Seconds left of each that all leave out, by model and replica."""
        return await self._run()

    async def vote(
        self, model: str, replica: str, seconds: float, replicas: int, most: float
    ) -> dict[tuple[str, str], float]:
        """This router ejected it: one of so many replicas of its model, of which at most a share may be left out."""
        milliseconds = round(seconds * 1000)
        return await self._run(model, replica, self._router, milliseconds, self._needed, replicas, repr(most))

    async def _run(self, *arguments: str | int) -> dict[tuple[str, str], float]:
        listed = [part.decode() for part in await self._script(keys=[_VOTES, _SHARED], args=list(arguments))]
        threes = zip(listed[::3], listed[1::3], listed[2::3], strict=True)
        return {(model, replica): int(left) / 1000 for model, replica, left in threes}


def voter_of(server: ServerConfig) -> str:
    """A router process as it votes: the same after it was started anew, or it would agree with itself. Several on one
    port differ by the address that each has beside it."""
    place = "\n".join((socket.gethostname(), server.listen, server.also_listen))
    return hashlib.sha256(place.encode()).hexdigest()[:16]


class Ejections:
    """Tells the others what this router ejects, and keeps its fleet as they agreed. While the store does not answer,
    each router is by itself, and what was agreed ends in its time."""

    def __init__(self, redis: Redis | None, fleet: Fleet, config: ReplicaConfig, router: str) -> None:
        """`router`: who votes; see `voter_of`."""
        shared = redis is not None and config.eject_routers > 0
        self._ballot = Ballot(redis, router, config.eject_routers) if redis is not None and shared else None
        self._fleet = fleet
        self._most = config.most_ejected
        self._following: asyncio.Task[None] | None = None
        self._stopped = False
        self._telling: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        if self._ballot is not None:
            self._fleet.on_ejection = self._note
            self._following = asyncio.create_task(self._follow(self._ballot))

    async def stop(self) -> None:
        self._stopped = True  # ends it even where the store's client swallows the cancel, as Python 3.11's wait_for may
        for task in (*self._telling, *filter(None, [self._following])):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _note(self, replica: Replica, replicas: int, seconds: float) -> None:
        """This router ejected one of so many of its model."""
        if self._ballot is not None:
            task = asyncio.create_task(self._tell(self._ballot, replica, replicas, seconds))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, ballot: Ballot, replica: Replica, replicas: int, seconds: float) -> None:
        name, model = replica.name, replica.model
        try:
            self._fleet.leave_out(await ballot.vote(model, name, seconds, replicas, self._most))
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("an ejection could not be told", replica=name, error=type(error).__name__)

    async def _follow(self, ballot: Ballot) -> None:
        while not self._stopped:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                self._fleet.leave_out(await ballot.read())
            await asyncio.sleep(_ASK_SECONDS)
