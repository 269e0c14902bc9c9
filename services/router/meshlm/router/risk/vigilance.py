"""What a caller's past does to its requests: they weigh more, wait behind a breaker, or are judged more strictly.

`look` comes before admission, `note` after the end. In shadow mode all is computed and told, and nothing follows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from functools import cache

import structlog
from opentelemetry.trace import Span
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name, begin, fail, meter
from meshlm.router.config import RouterConfig
from meshlm.router.measure import text_of
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.risk.assessment import Assessment
from meshlm.router.risk.breaker import State
from meshlm.router.risk.risk import guard_risk, is_attack
from meshlm.router.risk.scoring import Scorer
from meshlm.router.risk.standing import Caller, Standing, Standings
from meshlm.router.risk.surprise import Estimator, Surprise, risk_of
from meshlm.router.work import Work
from meshlm.v1 import inference_pb2

log = structlog.get_logger()

# Turns of the event loop within which a request that is let in is sent to guard and cache, or to its worker.
_SENT_TURNS = 3


class Vigilance:
    def __init__(self, config: RouterConfig, redis: Redis | None, fleet: Fleet) -> None:
        self._config = config
        self._standings = Standings(redis, config.risk, config.breakers)
        self._estimator = Estimator()
        self._scorer = Scorer(redis, fleet, config.entropy)
        self._scoring: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._surprises = meter().create_histogram(Name.SURPRISE, "nats", "Prompts' surprise, by what read them")
        self._risks = meter().create_histogram(Name.RISK, "1", "Risk of requests, by where it comes from")
        self._trips = meter().create_counter(Name.BREAKER_TRIPS, "{trip}", "Breakers that opened, by scope")
        self._refusals = meter().create_counter(Name.BREAKER_REFUSALS, "{request}", "Requests that met an open breaker")

    async def look(self, work: Work) -> None:
        """Sets `work.assessment`, and what follows from it: the weight of its terms, and its guard's policy.

        Raises MeshError BREAKER_OPEN.
        """
        mode = work.key.risk or self._config.risk.mode
        if mode == "off":
            return
        current = begin("router.risk")
        try:
            found = await self._assess(work, shadow=mode == "shadow")
        except BaseException as error:
            fail(current, type(error).__name__)
            current.end()
            raise
        if not found.standing.passes:
            self._refusals.add(1, {Name.TENANT: found.caller.tenant, Name.RISK_SHADOW: found.shadow})
        try:
            self._follow(work, found)
        except MeshError as error:
            fail(current, error.reason)
            raise
        finally:
            self._tell(current, work, found)

    async def _assess(self, work: Work, *, shadow: bool) -> Assessment:
        """Sets `work.assessment`."""
        caller = Caller(work.key.tenant, work.key.id, work.generation.model)
        identifier = f"{work.request_id}/{work.trace_id}/{time.monotonic_ns()}"
        place, text = self._scorer.place(work), text_of(work.generation.input)
        looking = asyncio.ensure_future(self._standings.look(caller, identifier, place or caller.no_score))
        try:
            # Asked in the one turn of the loop, sent in the other: it answers while the prompt is read here.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            read = self._reader(text)
            if work.terms is None or work.terms.limits:
                read()
            standing = await asyncio.shield(looking)  # the store's client may swallow a cancel
        except BaseException:
            self._leave(looking, caller, identifier)
            raise
        work.assessment = self._assessment(caller, identifier, standing, place, read, shadow=shadow)
        return work.assessment

    def _tell(self, current: Span, work: Work, found: Assessment) -> None:
        """Its span has all of it, and ends once the prompt is read: now, if a limit counts with that; else as soon as
        the request went to whom it goes next, which is within so many turns of the loop."""
        standing = found.standing

        def tell() -> None:
            surprise = found.surprise
            current.set_attributes(
                {
                    Name.RISK_CALLER: standing.risk,
                    Name.RISK_PROMPT: found.of_prompt,
                    **({Name.SURPRISE: surprise.nats, Name.SURPRISE_SOURCE: surprise.source} if surprise else {}),
                    Name.RISK_WEIGHT: found.weight,
                    Name.RISK_SHADOW: found.shadow,
                    Name.RISK_SHARED: standing.shared,
                    Name.BREAKER_KEY: standing.key,
                    Name.BREAKER_ROUTE: standing.route,
                }
            )
            current.end()

        later = standing.passes and work.terms is not None and not work.terms.limits
        _after_turns(_SENT_TURNS if later else 0, tell)

    def _leave(self, looking: asyncio.Future[Standing], caller: Caller, identifier: str) -> None:
        """Its request is gone while it is looked at: the probe of a breaker that it may get is given back."""

        async def give_back() -> None:
            await asyncio.wait({looking})
            await self._standings.note(caller, identifier, risk=0.0, flagged=None)

        task = asyncio.create_task(give_back())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def peek(self, work: Work) -> None:
        """As `look`, for a request that is not to run: nothing is counted, and no probe of a breaker is taken."""
        mode = work.key.risk or self._config.risk.mode
        if mode == "off":
            return
        caller, place = Caller(work.key.tenant, work.key.id, work.generation.model), self._scorer.place(work)
        standing = await self._standings.peek(caller, place or caller.no_score)
        read = self._reader(text_of(work.generation.input))
        work.assessment = self._assessment(caller, "", standing, place, read, shadow=mode == "shadow")
        self._follow(work, work.assessment)

    def _assessment(
        self,
        caller: Caller,
        identifier: str,
        standing: Standing,
        place: str,
        read: Callable[[], Surprise | None],
        *,
        shadow: bool,
    ) -> Assessment:
        ramps = self._config.entropy.ramps
        return Assessment(caller, identifier, shadow, standing, place, ramps, lambda: self._riskier(standing, read()))

    def _follow(self, work: Work, found: Assessment) -> None:
        """What follows from an assessment. Raises MeshError BREAKER_OPEN."""
        if found.shadow:
            return
        if not found.standing.passes:
            raise _refusal(found.standing.wait)
        if found.standing.route is not State.CLOSED:
            self._tighten(work)
        if work.terms is not None and work.terms.limits:
            work.terms = dataclasses.replace(work.terms, weight=found.weight)

    def read(self, work: Work) -> None:
        """Once a request is admitted: have its prompt scored beside it, where a model is to and has not yet."""
        found = work.assessment
        if found is None or not found.place or found.standing.score:
            return
        task = asyncio.create_task(self._score(work, found))
        self._scoring.add(task)
        task.add_done_callback(self._scoring.discard)

    async def stop(self) -> None:
        """Scores that are still awaited are of no use any more; what is given back is."""
        if self._leaving:
            await asyncio.wait(self._leaving)
        for task in list(self._scoring):
            task.cancel()
        if self._scoring:
            await asyncio.wait(self._scoring)

    async def note(self, work: Work) -> None:
        """The request is over: what it says of its caller counts for the next ones."""
        found = work.assessment
        if found is None:
            return
        self._measure(found)
        if found.refused:
            return
        found.noted = True
        seen = guard_risk(work)
        risk = max(seen, found.of_prompt, self._risk_of(found.scored))
        attack = is_attack(work, flag_score=self._config.risk.flag_score)
        self._risks.record(seen, {"source": "guard"})
        opened = await self._standings.note(found.caller, found.identifier, risk=risk, flagged=attack)
        for scope, trips in (("key", opened.key), ("route", opened.route)):
            if trips:
                labels: dict[str, str | bool] = {
                    Name.TENANT: found.caller.tenant,
                    "scope": scope,
                    Name.RISK_SHADOW: found.shadow,
                }
                self._trips.add(1, labels)
                log.warning(
                    "breaker opened",
                    scope=scope,
                    tenant=found.caller.tenant,
                    key=found.caller.key,
                    route=found.caller.route,
                    shadow=found.shadow,
                )

    def _measure(self, found: Assessment) -> None:
        """What was thought of it at first; told at its end, when nobody waits for it."""
        if (surprise := found.surprise) is not None:
            self._count(surprise)
        self._risks.record(found.standing.risk, {"source": "caller"})
        self._risks.record(found.of_prompt, {"source": "prompt"})

    def _count(self, surprise: Surprise) -> None:
        """A prompt less surprising than its language is below zero, which a histogram does not take: it counts as 0, or
        quantiles would be of the other prompts alone."""
        self._surprises.record(max(0.0, surprise.nats), {"source": "model" if surprise.by_model else "ngram"})

    def _reader(self, text: str) -> Callable[[], Surprise | None]:
        """The estimate of a prompt, made once."""
        return cache(lambda: self._estimator.surprise(text, self._config.entropy.tokens))

    def _riskier(self, standing: Standing, estimate: Surprise | None) -> Surprise | None:
        """Of the estimate and what a model said of this prompt before: one sees noise, one suffixes."""
        known = self._scorer.recall(standing.score) if standing.score else None
        return max(known, estimate, key=self._risk_of) if known is not None else estimate

    def _risk_of(self, surprise: Surprise | None) -> float:
        return risk_of(surprise, self._config.entropy.ramps)

    async def _score(self, work: Work, found: Assessment) -> None:
        """Nobody waits for it: the weight stays what it was, and the caller's next requests know."""
        scored = await self._scorer.score(work, found.place)
        if scored is None:
            return
        found.scored = scored
        self._count(scored)
        if found.noted:
            await self._standings.note(found.caller, found.identifier, risk=self._risk_of(scored), flagged=None)

    def _tighten(self, work: Work) -> None:
        """The tenant's breaker is open on this route: its requests are judged strictly, and not without a guard."""
        policy = self._config.breakers.strict_policy or work.key.guard_policy
        work.key = dataclasses.replace(work.key, guard_policy=policy, guard_failure="refuse")


def _after_turns(turns: int, act: Callable[[], None]) -> None:
    """Once the event loop went round so often; at once for 0."""
    if turns:
        asyncio.get_running_loop().call_soon(_after_turns, turns - 1, act)
    else:
        act()


def admission_of(work: Work) -> inference_pb2.Admission | None:
    """What the caller is told; None where nothing was looked at."""
    found = work.assessment
    if found is None:
        return None
    told = inference_pb2.Admission(risk=round(found.risk, 2), weight=round(found.in_force, 2), shadow=found.shadow)
    if found.surprise is not None:
        told.surprise, told.surprise_source = round(found.surprise.nats, 2), found.surprise.source
    if found.shadow:
        told.shadow_weight = round(found.weight, 2)
        told.shadow_refused = not found.standing.passes
    return told


def _refusal(wait: float) -> MeshError:
    return MeshError(
        Reason.BREAKER_OPEN,
        "too many of this key's recent requests were attacks",
        metadata={"holder": "key", "wait_seconds": f"{wait:.3f}"},
        retry_after=wait,
    )
