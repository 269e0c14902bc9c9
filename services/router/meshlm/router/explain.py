"""What would happen to a request, and why, without running it: `ExplainRoute`.

It goes through the pipeline's stages, in the same order, and each is asked in a way that takes nothing. A stage that
would refuse is told, and the next ones are looked at all the same, as far as they can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from meshlm.chassis.errors import MeshError
from meshlm.chassis.validation import is_deterministic
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook, Usage
from meshlm.router.accounts.reservation import Peek
from meshlm.router.config import RouterConfig
from meshlm.router.decision import routing_of
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload import Overload, urgency_of
from meshlm.router.replicas.residency import Residency
from meshlm.router.risk.vigilance import Vigilance, admission_of
from meshlm.router.routing.routes import Routes
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2
from meshlm.v1 import inference_pb2 as pb


class Explainer:
    """Asks the parts that the pipeline uses."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        ledger: Ledger,
        fleet: Fleet,
        routes: Routes,
        residency: Residency,
        vigilance: Vigilance,
        overload: Overload,
    ) -> None:
        self._config = config
        self._book = LimitBook(config)
        self._ledger = ledger
        self._fleet = fleet
        self._routes = routes
        self._residency = residency
        self._vigilance = vigilance
        self._overload = overload

    async def explain(self, work: Work) -> pb.ExplainRouteResponse:
        """Raises nothing that the request itself would be refused with: that is what is told."""
        told = pb.ExplainRouteResponse(
            key_id=work.key.id,
            tenant=work.key.tenant,
            priority=work.generation.priority,
            prompt_tokens=work.measure.tokens,
            completion_tokens=work.completion_at_most,
        )
        work.regions = self._residency.regions(work.key)
        told.regions = str(work.regions)
        with _stage(told, "residency"):
            self._residency.check(work.regions)
        try:
            work.route = self._routes.resolve(replace(work.query, trial=True))
        except MeshError as error:  # without a model, nothing more can be known
            _refuse(told, "model", error)
            return told
        self._bind(work)
        with _stage(told, "risk"):
            await self._vigilance.peek(work)
        if (admission := admission_of(work)) is not None:
            told.admission.CopyFrom(admission)
        told.guard_policy = (work.key.guard_policy or "default") if self._config.guard else ""
        await self._limits(work, told)
        with _stage(told, "replica"):
            self._choose(work, told)
        told.cache = self._cache(work)
        return told

    def _bind(self, work: Work) -> None:
        assert work.route is not None  # noqa: S101
        work.generation.model = work.route.model
        work.terms = self._book.terms(work.key, work.route.model, work.weight)

    async def _limits(self, work: Work, told: pb.ExplainRouteResponse) -> None:
        assert work.terms is not None  # noqa: S101
        peek: Peek = await self._ledger.peek(work.terms, work.measure.tokens, work.completion_at_most)
        told.ledger = peek.mode
        for number, limit in enumerate(work.terms.limits):
            line = pb.ExplainedLimit(
                limit=limit.kind, holder=limit.holder, holder_id=limit.holder_id, model=limit.model, amount=limit.amount
            )
            if peek.left:
                line.left = peek.left[number]
            told.limits.append(line)
        most = Usage(work.measure.tokens, 0, work.completion_at_most)
        if (cost := work.terms.cost(most)) is not None:
            told.most_cost_micros = cost
        if peek.refused is not None:
            _refuse(told, "limits", peek.refused)

    def _choose(self, work: Work, told: pb.ExplainRouteResponse) -> None:
        """The replica, or that of the next model of its route. Raises MeshError where there is none."""
        assert work.route is not None  # noqa: S101
        while True:
            try:
                urgency = urgency_of(work.generation.priority)
                choice = self._fleet.look(work.wanted, urgency.share)
                if choice is None:
                    told.queue_seconds = self._overload.predicted_wait(work.generation.model, urgency)
                work.choice = choice or self._fleet.choose(work.wanted)
                break
            except MeshError as error:
                if not self._routes.fall_back(work.route, error):
                    raise
                self._bind(work)
        told.routing.CopyFrom(routing_of(work))
        first = work.choice.replicas[0]
        told.routing.replica = first.name
        told.routing.region = first.state.region if first.state is not None else ""

    def _cache(self, work: Work) -> str:
        if not self._config.cache:
            return "none"
        if not self._residency.cache_allowed(work.regions):
            return "region"
        policy = work.generation.cache_policy
        if policy == generation_pb2.CACHE_POLICY_BYPASS:
            return "bypass"
        if policy == generation_pb2.CACHE_POLICY_ALWAYS or is_deterministic(work.generation.sampling):
            return "asked"
        return "bypass"


@contextmanager
def _stage(told: pb.ExplainRouteResponse, name: str) -> Iterator[None]:
    """A stage that may refuse: that is told, and the next one looked at."""
    try:
        yield
    except MeshError as error:
        _refuse(told, name, error)


def _refuse(told: pb.ExplainRouteResponse, stage: str, error: MeshError) -> None:
    refusal = pb.ExplainedRefusal(stage=stage, reason=error.reason, message=error.message, metadata=error.metadata)
    if error.retry_after is not None:
        refusal.retry_after_seconds = error.retry_after
    told.refusals.append(refusal)
