"""What a caller's recent requests say of it: its risk, and the state of its breakers. Shared by all routers in Valkey.

Each router also keeps its own account of what passed through it, which counts while Valkey does not answer.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.breaker import Breaker as Reach
from meshlm.chassis.telemetry import Name, meter
from meshlm.router.risk.breaker import Breaker, State
from meshlm.router.risk.config import BreakerConfig, RiskConfig
from meshlm.router.risk.standing_script import STANDING

log = structlog.get_logger()

# After a failure Valkey is left alone so long, so that its timeout is not paid by every request, seconds.
_PAUSE = 1.0
# Callers, and routes, that a router remembers by itself.
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks, and for what."""

    tenant: str
    key: str
    route: str  # the model

    @property
    def places(self) -> tuple[str, str, str]:
        """Keys of its risk, its breaker, and its tenant's breaker on this route; all in one slot of a cluster."""
        tenant = f"meshlm:{{{self.tenant}}}"
        return f"{tenant}:risk:{self.key}", f"{tenant}:breaker:key:{self.key}", f"{tenant}:breaker:route:{self.route}"

    @property
    def no_score(self) -> str:
        """A key in the same slot under which nothing is kept."""
        return f"meshlm:{{{self.tenant}}}:surprise:none"


@dataclass(frozen=True)
class Standing:
    """A caller's, before one of its requests."""

    risk: float = 0.0
    key: State = State.CLOSED
    route: State = State.CLOSED
    passes: bool = True  # as far as the key's breaker is concerned
    wait: float = 0.0  # seconds, where it does not pass
    score: str = ""  # what is remembered of this prompt
    shared: bool = True


@dataclass(frozen=True)
class Opened:
    """Which breakers a request has opened."""

    key: bool = False
    route: bool = False


class Standings:
    def __init__(
        self,
        redis: Redis | None,
        risk: RiskConfig,
        breakers: BreakerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Random | None = None,
    ) -> None:
        self._script = redis.register_script(STANDING) if redis is not None else None
        self._half_life = risk.half_life_seconds * 1000
        self._breakers = breakers
        self._clock = clock
        self._chance = chance or Random()  # noqa: S311  it spreads load, and keeps no secret
        self._own = _Own(self._half_life, breakers)
        self._breaker = Reach(1, _PAUSE, clock=clock)  # of the store
        self._answers = True
        self._alone = meter().create_gauge(
            Name.RISK_LOCAL, "1", "1 while this router knows callers' risk by itself only"
        )

    async def look(self, caller: Caller, identifier: str, score: str) -> Standing:
        """Before a request. `score`: the key under which its prompt's score would be remembered."""
        own = self._own.look(caller, identifier, self._clock() * 1000)
        answer = await self._run("look", caller, identifier, [*caller.places, score])
        if answer is None:
            return own
        return _standing(answer)

    async def peek(self, caller: Caller, score: str) -> Standing:
        """As `look`, for a request that is not to run: no probe is taken."""
        answer = await self._run("peek", caller, "", [*caller.places, score])
        return self._own.peek(caller, self._clock() * 1000) if answer is None else _standing(answer)

    async def note(self, caller: Caller, identifier: str, *, risk: float, flagged: bool | None) -> Opened:
        """After it: the risk that was seen in it, and whether it was an attack (None: nobody can say)."""
        jitter = [self._chance.uniform(0.8, 1.2), self._chance.uniform(0.8, 1.2)]
        own = self._own.note(caller, identifier, risk, flagged, self._clock() * 1000, jitter)
        told = {"risk": risk, "flagged": -1 if flagged is None else int(flagged), "jitter": jitter}
        answer = await self._run("note", caller, identifier, list(caller.places), **told)
        return own if answer is None else Opened(answer[1] == 1, answer[2] == 1)

    async def _run(
        self, operation: str, caller: Caller, identifier: str, keys: list[str], **told: object
    ) -> list[object] | None:
        """The script's answer; None where there is none."""
        if self._script is None or not self._breaker.allows():
            return None
        config = self._breakers
        ask = {
            "op": operation,
            "id": identifier,
            "half_life": self._half_life,
            "open": config.open_seconds * 1000,
            "longest": config.longest_seconds * 1000,
            "probe": config.probe_seconds * 1000,
            "baseline": config.baseline,
            "highest": config.highest_baseline,
            **told,
        }
        try:
            answer: list[object] = await self._script(keys=keys, args=[json.dumps(ask)])
        except (RedisError, OSError, TimeoutError) as error:
            self._pause(error)
            return None
        except BaseException:
            self._breaker.leave()
            raise
        self._breaker.succeed()
        if not self._answers:
            log.info("callers' standing is shared again")
            self._alone.set(0)
        self._answers = True
        return answer

    def _pause(self, error: Exception) -> None:
        self._breaker.fail()
        if self._answers:
            told = type(error).__name__
            log.warning("callers' standing is not shared: this router's own account counts", error=told)
            self._alone.set(1)
        self._answers = False


class _Own:
    """The account of one router; all times are milliseconds."""

    def __init__(self, half_life: float, config: BreakerConfig) -> None:
        self._half_life = half_life
        self._config = config
        self._risks: OrderedDict[str, tuple[float, float]] = OrderedDict()  # risk, and when
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()

    def look(self, caller: Caller, identifier: str, now: float) -> Standing:
        place, of_key, of_route = caller.places
        risk = self._risk(place, now)
        key = self._breaker(of_key).look(identifier, now)
        if not key.passes:
            return Standing(risk, key.state, passes=False, wait=key.wait / 1000, shared=False)
        return Standing(risk, key.state, self._breaker(of_route).look(identifier, now).state, shared=False)

    def peek(self, caller: Caller, now: float) -> Standing:
        place, of_key, of_route = caller.places
        key, risk = self._breaker(of_key), self._risk(place, now)
        if key.state is State.OPEN and now < key.until:
            return Standing(risk, key.state, passes=False, wait=(key.until - now) / 1000, shared=False)
        return Standing(risk, key.state, self._breaker(of_route).state, shared=False)

    def note(
        self, caller: Caller, identifier: str, risk: float, flagged: bool | None, now: float, jitter: list[float]
    ) -> Opened:
        place, of_key, of_route = caller.places
        if risk > self._risk(place, now):
            self._risks[place] = risk, now
            self._risks.move_to_end(place)
            if len(self._risks) > _REMEMBERED:
                self._risks.popitem(last=False)
        opened = [
            self._breaker(name).note(identifier, flagged, now, spread)
            for name, spread in zip((of_key, of_route), jitter, strict=True)
        ]
        return Opened(*opened)

    def _risk(self, place: str, now: float) -> float:
        risk, at = self._risks.get(place, (0.0, now))
        return float(risk * 0.5 ** ((now - at) / self._half_life))

    def _breaker(self, name: str) -> Breaker:
        breaker = self._breakers.setdefault(name, Breaker(self._config))
        self._breakers.move_to_end(name)
        if len(self._breakers) > _REMEMBERED:
            self._breakers.popitem(last=False)
        return breaker


def _standing(answer: list[object]) -> Standing:
    risk, key, passes, wait, route, score = (_text(part) for part in answer)
    return Standing(float(risk), State(key), State(route), passes == "1", int(wait) / 1000, score)


def _text(part: object) -> str:
    return part.decode() if isinstance(part, bytes) else str(part)
