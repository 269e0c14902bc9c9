"""Questions that make no answer (CountTokens, ExplainRoute) have an allowance too, apart from that of requests."""

from __future__ import annotations

import asyncio
import itertools
import time

from meshlm.chassis.telemetry import Name, span
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook
from meshlm.router.config import KeyConfig, RouterConfig

_numbers = itertools.count()


class Inquiries:
    """As many a minute as `requests_per_minute` of the key and of its tenant, in accounts of their own: whoever counts
    before each request is not halved by it."""

    def __init__(self, config: RouterConfig, ledger: Ledger) -> None:
        self._book = LimitBook(config)
        self._ledger = ledger

    async def admit(self, key: KeyConfig, request_id: str) -> None:
        """Take one. Raises MeshError RATE_LIMITED. There is nothing to settle: it is used however the call ends."""
        terms = self._book.inquiry_terms(key)
        with span("router.admit") as current:
            identifier = f"{request_id}/inquiry/{next(_numbers)}/{time.monotonic_ns()}"
            reserving = asyncio.ensure_future(self._ledger.reserve(identifier, terms, 0, 0, final=True))
            reservation = await asyncio.shield(reserving)  # the store's client may swallow a cancel
            current.set_attribute(Name.LEDGER_MODE, reservation.mode)
