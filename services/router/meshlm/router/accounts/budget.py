"""How far a stream is paid for: asks the ledger for more before that ends, and says when there is no more."""

from __future__ import annotations

import asyncio

from meshlm.chassis.errors import MeshError
from meshlm.router.accounts.ledger import SLICE, Ledger
from meshlm.router.accounts.limits import Limit, Usage
from meshlm.router.accounts.reservation import Reservation, spent


class Budget:
    """One stream's. Asks once a slice, beside the stream; a message waits only where it is ahead of the answer."""

    def __init__(self, ledger: Ledger, reservation: Reservation, at_most: int) -> None:
        """`at_most`: completion tokens that the request can make, over all its choices."""
        self._ledger = ledger
        self._reservation = reservation
        self._at_most = at_most
        self._asking: asyncio.Task[None] | None = None
        self._short: tuple[Limit, float] | None = None  # the limit that last granted less than was asked

    async def accept(self, usage: Usage) -> None:
        """The worker counted the prompt. Waits where the estimate was too low: the answer must not be granted what the
        prompt has taken."""
        if not self._reservation.endless and usage.prompt > self._reservation.usage.prompt:
            await asyncio.wait({asyncio.create_task(self._extend(usage, more=0, least=0))})

    def covers(self, usage: Usage) -> bool:
        """Whether a message after which so much was sent is paid for. Asks for more where it soon will not be."""
        if self._reservation.endless:
            return True
        granted = self._reservation.granted
        if usage.completion > granted:
            return False
        if self._short is None and granted - usage.completion <= SLICE // 2 and granted < self._at_most:
            self._ask(usage)
        return True

    async def secure(self, usage: Usage) -> bool:
        """Wait until that message is paid for; False: it cannot be, for a limit is used up."""
        # Not awaited itself: a cancel of the stream would go on into the store's client, which may swallow it.
        if self._asking is not None:
            await asyncio.wait({self._asking})
        if not self.covers(usage):
            await asyncio.wait({self._ask(usage)})
        return usage.completion <= self._reservation.granted

    def error(self, usage: Usage) -> MeshError:
        """Why the stream ends: BUDGET_SPENT. `usage` is what was sent."""
        assert self._short is not None  # noqa: S101  `secure` said so
        limit, wait = self._short
        terms = self._reservation.terms
        error = spent(limit, wait, usage, terms.cost(usage))
        self._ledger.refuse_stream(error, terms)
        return error

    def _ask(self, usage: Usage) -> asyncio.Task[None]:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._extend(usage))
        return self._asking

    async def _extend(self, usage: Usage, more: int = SLICE, least: int | None = None) -> None:
        """`more` than is held, or than this message takes where that is larger; at least what was granted before."""
        granted = self._reservation.granted
        wanted = max(usage.completion, min(self._at_most, max(granted, usage.completion) + more))
        self._reservation.usage = Usage(usage.prompt, usage.cached, granted if least is None else least)
        self._short = await self._ledger.extend(self._reservation, self._reservation.usage, wanted)
