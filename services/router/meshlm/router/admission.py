"""Stage 2, admit: the model that is meant, and what a request may use of it; again for each model it comes to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

from opentelemetry.trace import Span

from meshlm.chassis.errors import MeshError
from meshlm.chassis.telemetry import Name, span
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook
from meshlm.router.accounts.reservation import Reservation
from meshlm.router.answers import Answers, Lookup
from meshlm.router.config import RouterConfig
from meshlm.router.measure import texture
from meshlm.router.replicas.residency import Residency
from meshlm.router.routing.routes import Routes
from meshlm.router.settling import Settling
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb


class Admission:
    def __init__(
        self,
        config: RouterConfig,
        ledger: Ledger,
        answers: Answers,
        residency: Residency,
        routes: Routes,
        settling: Settling,
    ) -> None:
        self._book = LimitBook(config)
        self._ledger = ledger
        self._answers = answers
        self._residency = residency
        self._routes = routes
        self._settling = settling

    def resolve(self, work: Work) -> None:
        """The model that is meant: limits and prices may be of one model."""
        work.regions = self._residency.regions(work.key)
        self._residency.check(work.regions)
        work.route = self._routes.resolve(work.query)
        self._bind(work, work.weight)

    def _bind(self, work: Work, weight: float) -> None:
        assert work.route is not None  # noqa: S101
        work.generation.model = work.route.model
        if work.route.temperature is not None:
            work.generation.sampling.temperature = work.route.temperature
        if work.route.top_p is not None:
            work.generation.sampling.top_p = work.route.top_p
        work.terms = self._book.terms(work.key, work.route.model, weight)

    async def fall_back(self, work: Work, error: MeshError) -> bool:
        """Go on with the route's next model; False where there is none. Raises MeshError where its limits refuse it."""
        assert work.route is not None  # noqa: S101
        if not self._routes.fall_back(work.route, error):
            return False
        await self.move(work)
        return True

    async def move(self, work: Work) -> None:
        """Put it under the limits and prices of the model that its route has come to. Raises MeshError where they
        refuse it."""
        held, work.reservation = work.reservation, None
        if held is not None:
            await self._settling.finish(self._ledger.void(held))
        lookup, work.lookup = work.lookup, Lookup()  # what the cache was asked for is another model's answer
        await self._settling.finish(self._answers.release(lookup))
        self._bind(work, work.weight)  # a caller's risk goes with it
        await self.admit(work)

    async def admit(self, work: Work) -> None:
        assert work.terms is not None  # noqa: S101
        attributes = {
            Name.PROMPT_BYTES: work.measure.size,
            Name.LEDGER_WEIGHT: work.terms.weight,
        }
        prompt = 0 if work.prompt_paid else work.measure.tokens
        with span("router.admit", attributes) as current:
            # The request's own id may be sent twice by a caller: a reservation is of this call alone.
            identifier = f"{work.request_id}/{work.trace_id}/{time.monotonic_ns()}"
            asking = self._ledger.reserve(identifier, work.terms, prompt, work.completion_at_most)
            if work.terms.limits:
                await self._reserve(work, asking)
            else:
                work.reservation = await asking  # asks nobody
            assert work.reservation is not None  # noqa: S101
            current.set_attribute(Name.LEDGER_MODE, work.reservation.mode)
            if current.is_recording():
                _describe(current, work.generation.input)
            if not work.reservation.endless:
                current.set_attribute(Name.TOKENS_RESERVED, prompt + work.reservation.granted)
        work.timing.admit = work.elapsed()

    async def _reserve(self, work: Work, asking: Coroutine[Any, Any, Reservation]) -> None:
        reserving = asyncio.ensure_future(asking)
        try:
            work.reservation = await asyncio.shield(reserving)
        except asyncio.CancelledError:
            # Redis goes on with the script: what it takes must be known, to be given back.
            with contextlib.suppress(MeshError):
                work.reservation = await reserving
            raise


def _describe(current: Span, source: pb.Input) -> None:
    looks = texture(source)
    current.set_attributes({Name.PROMPT_ENTROPY: looks.entropy, Name.PROMPT_COMPRESSION: looks.compression})
