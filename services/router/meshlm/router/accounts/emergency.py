"""Limits in this process alone, at a share of each, for while the ledger does not answer."""

from __future__ import annotations

import math
from collections.abc import Callable

from meshlm.router.accounts.limits import Kind, Limit, Line
from meshlm.router.accounts.reservation import Reservation, refusal

_SECONDS = {Kind.DAY: 86_400.0, Kind.MONTH: 30 * 86_400.0}


class EmergencyLimits:
    """GCRA for rates and for money (over a day, or thirty), a count for streams."""

    def __init__(self, share: float, clock: Callable[[], float]) -> None:
        self._share = share
        self._clock = clock
        self._arrival: dict[str, float] = {}  # theoretical arrival time, seconds of the clock
        self._streams: dict[str, dict[str, float]] = {}  # weights by reservation

    def reserve(self, reservation: Reservation, lines: list[Line], wanted: int) -> None:
        """Take all of it, or raise MeshError RATE_LIMITED or BUDGET_SPENT."""
        worst: tuple[float, Limit] | None = None
        for limit, line in zip(reservation.terms.limits, lines, strict=True):
            wait = self._wait(limit, line.cost(wanted), reservation.id)
            if wait > 0 and (worst is None or wait > worst[0]):
                worst = wait, limit
        if worst is not None:
            raise refusal(worst[1], worst[0])
        reservation.held = [0.0] * len(lines)
        self.move(reservation, lines, wanted)

    def extend(self, reservation: Reservation, lines: list[Line], wanted: int) -> tuple[int, int, float]:
        """Take as much as there is.

        Returns completion tokens granted, which limit was short (its index, or -1), and the seconds until all would be.
        """
        granted, short, wait = wanted, -1, 0.0
        for index, (limit, line) in enumerate(zip(reservation.terms.limits, lines, strict=True)):
            if not line.each:
                continue
            room = self._room(limit) + reservation.held[index]
            most = math.floor((room * line.scale - line.fixed) / line.each + 1e-6)
            if most < granted:
                granted, short = most, index
                wait = self._wait(limit, line.cost(wanted) - reservation.held[index], reservation.id)
        granted = max(granted, min(wanted, reservation.granted))  # what was granted once stays
        self.move(reservation, lines, granted)
        return granted, short, wait

    def move(self, reservation: Reservation, lines: list[Line], completion: int) -> None:
        """Hold what so many completion tokens cost. Only what was taken here is given back here."""
        now = self._clock()
        reservation.local = reservation.local or [0.0] * len(lines)
        for index, (limit, line) in enumerate(zip(reservation.terms.limits, lines, strict=True)):
            cost = line.cost(completion)
            change = max(cost - reservation.held[index], -reservation.local[index])
            reservation.held[index] = cost
            reservation.local[index] += change
            if limit.kind is Kind.STREAMS:
                self._streams.setdefault(limit.state, {})[reservation.id] = cost
            else:
                emission = _seconds(limit) / (limit.amount * self._share)
                self._arrival[limit.state] = max(self._arrival.get(limit.state, 0.0), now) + change * emission

    def leave(self, reservation: Reservation) -> None:
        """The reservation is over: its streams' places are free."""
        for limit in reservation.terms.limits:
            if limit.kind is Kind.STREAMS:
                self._streams.get(limit.state, {}).pop(reservation.id, None)

    def _room(self, limit: Limit) -> float:
        """How much there is now, in the limit's unit."""
        ahead = max(0.0, self._arrival.get(limit.state, 0.0) - self._clock())
        return limit.amount * self._share * (1 - ahead / _seconds(limit))

    def _wait(self, limit: Limit, cost: float, identifier: str) -> float:
        """Seconds until so much more is there; 0: now."""
        if limit.kind is Kind.STREAMS:
            others = sum(weight for name, weight in self._streams.get(limit.state, {}).items() if name != identifier)
            # A share below one stream is one stream; what weighs more than the share passes alone.
            return 1.0 if others and others + cost > max(1.0, limit.amount * self._share) else 0.0
        # What alone is more than the share still passes when nothing else is in the way.
        missing = cost - max(self._room(limit), 0.0 if self._ahead(limit) else cost)
        return max(0.0, missing * _seconds(limit) / (limit.amount * self._share)) if missing > 1e-6 else 0.0

    def _ahead(self, limit: Limit) -> bool:
        return self._arrival.get(limit.state, 0.0) > self._clock()


def _seconds(limit: Limit) -> float:
    return _SECONDS.get(limit.kind, 60.0)
