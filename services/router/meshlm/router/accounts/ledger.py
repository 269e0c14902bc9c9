"""Limits and money: reserved before anything is spent, extended while it streams, settled with what was sent.

`ledger_script.py` has the accounting, one round trip an operation. While Redis does not answer, each router grants a
share of the limits by itself (`emergency.py`), and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.breaker import Breaker
from meshlm.chassis.errors import MeshError
from meshlm.chassis.telemetry import Name, meter
from meshlm.router.accounts.emergency import EmergencyLimits
from meshlm.router.accounts.ledger_script import LEDGER
from meshlm.router.accounts.limits import Limit, Line, Terms, Usage
from meshlm.router.accounts.reservation import Peek, Reservation, refusal
from meshlm.router.config import RouterConfig

log = structlog.get_logger()

# A ledger that failed is left alone this long, seconds; then one operation at a time asks it. So not every request pays
# its timeout.
_PAUSE = 1.0
# Settlements kept for a ledger that does not answer.
_OWED = 10_000
# How long a router that ends tries to tell them, seconds: shorter than what it is given to end in.
_LAST_TRIES = 5.0
# What is over is remembered so long, ms, for an operation of it that comes late; as the script does a settlement.
_OVER_MS = 60_000
# Completion tokens reserved at a time.
SLICE = 256


class Ledger:
    """Any number of routers with the same Redis keep one account."""

    def __init__(self, redis: Redis | None, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._script = redis.register_script(LEDGER) if redis is not None else None
        self._expiry_ms = round(config.reservation_seconds * 1000)
        self._lease_ms = round(config.lease_seconds * 1000)
        self._clock = clock
        self._emergency = EmergencyLimits(config.emergency_share, clock)
        self._breaker = Breaker(1, _PAUSE, clock=clock)
        self._answers: bool | None = None  # until it was asked
        self._owed: deque[tuple[Reservation, Usage]] = deque(maxlen=_OWED)
        self._paying: asyncio.Task[None] | None = None
        self._leases: set[Reservation] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._refusals = meter().create_counter(Name.LEDGER_REFUSALS, "{refusal}", "Requests and streams over a limit")
        self._state = meter().create_gauge(Name.LEDGER_EMERGENCY, "1", "1 while this router limits by itself")

    async def stop(self) -> None:
        """End what runs beside requests; what the ledger was not told yet is told within a few seconds, or never."""
        self._leases.clear()  # ends the renewal even where a cancel is swallowed, as Python 3.11's wait_for may
        for task in (self._renewing, self._paying):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        end = time.monotonic() + _LAST_TRIES
        while self._owed and self._script is not None:
            self._paying = asyncio.create_task(self._pay())
            await self._paying
            if self._owed and time.monotonic() > end:
                log.error("settlements the ledger was not told: what they held stays charged", count=len(self._owed))
                break
            await asyncio.sleep(_PAUSE / 4 if self._owed else 0)

    async def reserve(
        self, identifier: str, terms: Terms, prompt: int, at_most: int, *, final: bool = False
    ) -> Reservation:
        """Take one request, a place for its stream, `prompt` tokens and the first slice of at most `at_most` more.
        `final`: that is all, and it is not settled.

        Raises MeshError RATE_LIMITED or BUDGET_SPENT: all or nothing, with the limit that takes longest, and the time
        to wait; without one where it can never pass.
        """
        usage = Usage(prompt=prompt)
        reservation = Reservation(identifier, terms, usage, final=final)
        if not terms.limits:
            return reservation
        try:
            wanted = reservation.first_slice(min(SLICE, at_most))
            await self._reserve(reservation, usage, wanted)
        except MeshError as error:
            if reservation.doubtful:
                self._owed.append((reservation, Usage()))
            self._count_refusal(error, terms, "admission")
            raise
        if any(line.each for line in reservation.lines(usage)):
            reservation.granted = wanted
        if any(limit.kind.form == "streams" for limit in terms.limits):
            self._keep(reservation)
        return reservation

    async def peek(self, terms: Terms, prompt: int, at_most: int) -> Peek:
        """What `reserve` would find now. Nothing is taken."""
        if not terms.limits:
            return Peek("unlimited")
        usage = Usage(prompt=prompt)
        reservation = Reservation(f"peek/{time.monotonic_ns()}", terms, usage)
        try:
            wanted = reservation.first_slice(min(SLICE, at_most))
        except MeshError as error:
            return Peek("shared", refused=error)
        answer = await self._run("peek", reservation, reservation.lines(usage), wanted, wanted)
        if answer is None:
            return Peek("emergency")
        outcome, _, wait, by, *left = answer
        return Peek("shared", tuple(left), None if outcome else refusal(terms.limits[by - 1], wait / 1e6))

    async def extend(self, reservation: Reservation, usage: Usage, wanted: int) -> tuple[Limit, float] | None:
        """Hold `wanted` completion tokens in all, but never fewer than `usage` has; sets `granted`.

        Returns the limit that granted less and the seconds until it would grant all; None where all was granted.
        """
        async with reservation.lock:
            if reservation.endless or reservation.settled:
                return None
            lines = reservation.lines(usage)
            answer = await self._run("extend", reservation, lines, wanted, usage.completion)
            if answer is not None:
                outcome, granted, wait, by, *_ = answer
                if outcome == 1:
                    reservation.mode = "shared"
                    reservation.granted = granted
                    reservation.held = [line.cost(granted) for line in lines]
                short, seconds = by - 1 if outcome == 1 else 0, wait / 1e6
            else:
                reservation.mode = "emergency"
                reservation.granted, short, seconds = self._emergency.extend(reservation, lines, wanted)
            return (reservation.terms.limits[short], seconds) if short >= 0 else None

    async def settle(self, reservation: Reservation, usage: Usage) -> bool:
        """Replace what is held by what was used. Idempotent. False where the ledger could not be told (yet)."""
        async with reservation.lock:
            if reservation.settled or not reservation.terms.limits:
                return not reservation.settled
            reservation.settled = True
            self._leases.discard(reservation)
            lines = reservation.lines(usage)
            answer = await self._run("settle", reservation, lines, usage.completion, usage.completion)
            if reservation.local:
                self._emergency.move(reservation, lines, usage.completion)
                self._emergency.leave(reservation)
            if answer is None:
                if self._script is not None:
                    self._owed.append((reservation, usage))
                return False
            return bool(answer[0] == 1)

    async def void(self, reservation: Reservation) -> None:
        """Give all of it back, the request too: another reservation stands for it from now on. Idempotent."""
        reservation.void = True
        await self.settle(reservation, Usage())

    def refuse_stream(self, error: MeshError, terms: Terms) -> None:
        """Count a stream that went as far as its limits let it."""
        self._count_refusal(error, terms, "stream")

    async def _reserve(self, reservation: Reservation, usage: Usage, wanted: int) -> None:
        lines = reservation.lines(usage)
        answer = await self._run("reserve", reservation, lines, wanted, wanted)
        if answer is None:
            reservation.mode = "emergency"
            self._emergency.reserve(reservation, lines, wanted)
            return
        outcome, _, wait, by, *left = answer
        if outcome == 0:
            raise refusal(reservation.terms.limits[by - 1], wait / 1e6)
        reservation.mode = "shared"
        reservation.held = [line.cost(wanted) for line in lines]
        if outcome == 1:
            reservation.note_left(left)

    async def _run(
        self, operation: str, reservation: Reservation, lines: list[Line], wanted: int, least: int
    ) -> list[int] | None:
        """The script's answer; None where the ledger gives none."""
        reservation.number += 1
        reservation.touched = self._clock()
        if self._script is None or not self._breaker.allows():
            return None
        keys = [f"meshlm:{{{reservation.terms.tenant}}}:reservation:{reservation.id}"]
        expiry = _OVER_MS if reservation.final else self._expiry_ms
        words = [f"{operation} {reservation.number} {wanted} {least} {expiry} {self._lease_ms}"]
        for limit, line in zip(reservation.terms.limits, lines, strict=True):
            keys += limit.places
            words.append(f"{limit.rule} {line.fixed!r} {line.each!r}")
        try:
            answer: list[int] = await self._script(keys=keys, args=[reservation.id, " ".join(words)])
        except (RedisError, OSError, TimeoutError) as error:
            reservation.doubtful = True
            self._pause(error)
            return None
        except BaseException:
            self._breaker.leave()
            raise
        self._note_answer()
        return answer

    def _pause(self, error: Exception) -> None:
        self._breaker.fail()
        if self._answers is not False:
            log.warning("the ledger does not answer: emergency limits are in force", error=type(error).__name__)
            self._state.set(1)
        self._answers = False

    def _note_answer(self) -> None:
        self._breaker.succeed()
        if self._answers is False:
            log.info("the ledger answers again")
        if not self._answers:
            self._state.set(0)
        self._answers = True
        if self._owed and (self._paying is None or self._paying.done()):
            self._paying = asyncio.create_task(self._pay())

    async def _pay(self) -> None:
        """Tell the ledger what was settled while it did not answer; it knows by the id what it was told before."""
        while self._owed:
            debt = self._owed[0]
            reservation, usage = debt
            lines = reservation.lines(usage)
            if await self._run("settle", reservation, lines, usage.completion, usage.completion) is None:
                return
            if self._owed[0] is debt:  # else it was the oldest of too many, and is gone
                self._owed.popleft()

    def _keep(self, reservation: Reservation) -> None:
        """Renew the lease of its stream's place until it is settled."""
        self._leases.add(reservation)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        period = self._lease_ms / 3000
        while self._leases:
            await asyncio.sleep(period)
            for reservation in list(self._leases):
                idle = self._clock() - reservation.touched >= period
                if idle and reservation in self._leases and not reservation.lock.locked():
                    await self._touch(reservation)

    async def _touch(self, reservation: Reservation) -> None:
        async with reservation.lock:
            if not reservation.settled:
                lines = reservation.lines(reservation.usage)
                granted = 0 if reservation.endless else reservation.granted
                await self._run("extend", reservation, lines, granted, granted)

    def _count_refusal(self, error: MeshError, terms: Terms, stage: str) -> None:
        labels = {name: error.metadata.get(name, "") for name in ("limit", "holder")}
        self._refusals.add(1, {**labels, Name.TENANT: terms.tenant, "stage": stage})
