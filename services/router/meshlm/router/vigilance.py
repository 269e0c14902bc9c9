"""What a caller's past does to its requests: they weigh more, wait behind a breaker, or are judged more strictly.

`look` comes before admission, `note` after the end. In shadow mode all is computed and told, and nothing follows.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name, meter, span
from meshlm.router.breaker import State
from meshlm.router.config import RouterConfig
from meshlm.router.risk import MOST, guard_risk, is_attack, weight_of
from meshlm.router.standing import Caller, Standing, Standings
from meshlm.router.work import Work
from meshlm.v1 import inference_pb2

log = structlog.get_logger()


@dataclass
class Assessment:
    """What was thought of one request before it was admitted."""

    caller: Caller
    identifier: str
    shadow: bool
    standing: Standing
    risk: float
    weight: float  # as it would be, were it not for the shadow

    @property
    def in_force(self) -> float:
        """The weight that the ledger counts with."""
        return 1.0 if self.shadow else self.weight

    @property
    def record(self) -> dict[str, object]:
        """For the audit line."""
        return {
            "risk": round(self.risk, 3),
            "weight": round(self.weight, 3),
            "shadow": self.shadow,
            "breaker": str(self.standing.key),
            "tenant_breaker": str(self.standing.route),
        }

    @property
    def refused(self) -> bool:
        """Whether the key's breaker turned it away."""
        return not self.standing.passes and not self.shadow


class Vigilance:
    def __init__(self, config: RouterConfig, redis: Redis | None) -> None:
        self._config = config
        self._standings = Standings(redis, config.risk, config.breakers)
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
        with span("router.risk") as current:
            caller = Caller(work.key.tenant, work.key.id, work.generation.model)
            identifier = f"{work.request_id}/{work.trace_id}/{time.monotonic_ns()}"
            standing = await self._standings.look(caller, identifier, f"{caller.places[0]}:score")
            tightened = standing.route is not State.CLOSED
            weight = MOST if tightened else weight_of(standing.risk)
            work.assessment = found = Assessment(caller, identifier, mode == "shadow", standing, standing.risk, weight)
            current.set_attributes(
                {
                    Name.RISK_CALLER: standing.risk,
                    Name.RISK_WEIGHT: weight,
                    Name.RISK_SHADOW: found.shadow,
                    Name.RISK_SHARED: standing.shared,
                    Name.BREAKER_KEY: standing.key,
                    Name.BREAKER_ROUTE: standing.route,
                }
            )
            self._risks.record(standing.risk, {"source": "caller"})
            if not standing.passes:
                self._refusals.add(1, {Name.TENANT: caller.tenant, Name.RISK_SHADOW: found.shadow})
            if found.shadow:
                return
            if not standing.passes:
                raise _refusal(standing.wait)
            if tightened:
                self._tighten(work)
            self._weigh(work, found)

    async def note(self, work: Work) -> None:
        """The request is over: what it says of its caller counts for the next ones."""
        found = work.assessment
        if found is None or found.refused:
            return
        risk = guard_risk(work)
        attack = is_attack(work, flag_score=self._config.risk.flag_score)
        self._risks.record(risk, {"source": "guard"})
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

    def _tighten(self, work: Work) -> None:
        """The tenant's breaker is open on this route: its requests are judged strictly, and not without a guard."""
        policy = self._config.breakers.strict_policy or work.key.guard_policy
        work.key = dataclasses.replace(work.key, guard_policy=policy, guard_failure="refuse")

    def _weigh(self, work: Work, found: Assessment) -> None:
        work.weight = found.weight
        if work.terms is not None:
            work.terms = dataclasses.replace(work.terms, weight=found.weight)


def admission_of(work: Work) -> inference_pb2.Admission | None:
    """What the caller is told; None where nothing was looked at."""
    found = work.assessment
    if found is None:
        return None
    told = inference_pb2.Admission(risk=round(found.risk, 2), weight=round(found.in_force, 2), shadow=found.shadow)
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
