"""One request's account while it runs: what it holds of each limit, and how far it may go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.accounts.limits import MILLION, Kind, Limit, Line, Terms, Usage

# No limit of the request counts its answer: it may go as far as it likes, and nothing is asked on the way.
ENDLESS = 1 << 62


@dataclass(eq=False)
class Reservation:
    """Taken by `Ledger.reserve`, moved by `extend`, ended by `settle`."""

    id: str
    terms: Terms
    usage: Usage  # the prompt is an estimate until the worker counted it
    mode: str = "unlimited"  # `shared` in Redis, `emergency` by this router alone
    granted: int = ENDLESS  # completion tokens paid for
    left: dict[Kind, int] = field(default_factory=dict)  # least over its holders, after it was taken
    held: list[float] = field(default_factory=list)  # of each limit, as far as this router knows
    local: list[float] = field(default_factory=list)  # of that, what was taken without the ledger
    number: int = 0  # of the last operation
    touched: float = 0.0  # when that was, seconds of the ledger's clock
    settled: bool = False
    final: bool = False  # nothing follows it: neither `extend` nor `settle`
    void: bool = False  # is to hold nothing, not even the request
    doubtful: bool = False  # an answer of the ledger was lost: it may hold more than this router knows
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one operation at a time

    def __post_init__(self) -> None:
        self._weights = [self._weight(limit) for limit in self.terms.limits]

    @property
    def endless(self) -> bool:
        """Whether nothing can end the stream before its own limit."""
        return self.granted == ENDLESS

    def lines(self, usage: Usage) -> list[Line]:
        """What each limit is charged."""
        if self.void:
            return [Line(0, 0, MILLION if limit.kind.money else 1) for limit in self.terms.limits]
        pairs = zip(self.terms.limits, self._weights, strict=True)
        return [self.terms.line(limit, usage, weight) for limit, weight in pairs]

    def first_slice(self, wanted: int) -> int:
        """Completion tokens to reserve at admission: `wanted`, or as many as every limit could ever grant.

        Raises MeshError RATE_LIMITED or BUDGET_SPENT, without a time to wait, where no whole allowance would do.
        """
        for limit, line in zip(self.terms.limits, self.lines(self.usage), strict=True):
            alone = self.terms.line(limit, self.usage, 1.0).cost(1)
            if alone > limit.amount:
                raise impossible(limit, alone)
            if line.each:
                most = int((limit.amount * line.scale - line.fixed) / line.each + 1e-9)
                wanted = min(wanted, max(1, most))
        return wanted

    def note_left(self, left: Sequence[int]) -> None:
        """What the ledger says is left of each limit."""
        for limit, amount in zip(self.terms.limits, left, strict=True):
            self.left[limit.kind] = min(amount, self.left.get(limit.kind, amount))

    def _weight(self, limit: Limit) -> float:
        """The terms' weight, as far as it leaves the request possible: a weight delays, and never refuses for good."""
        alone = self.terms.line(limit, self.usage, 1.0).cost(1)
        return min(self.terms.weight, max(1.0, limit.amount / alone)) if alone else self.terms.weight


@dataclass(frozen=True)
class Peek:
    """What a reservation would find."""

    mode: str  # as of a reservation
    left: tuple[int, ...] = ()  # of each limit of its terms; empty where that is not known
    refused: MeshError | None = None


def impossible(limit: Limit, least: float) -> MeshError:
    """A request that can never pass."""
    return MeshError(
        Reason.BUDGET_SPENT if limit.kind.money else Reason.RATE_LIMITED,
        f"the request is estimated at {least:.0f}, more than the whole of {limit.kind} = {limit.amount}",
        metadata={**limit.metadata, "permanent": "true"},
    )


def refusal(limit: Limit, wait: float) -> MeshError:
    """A request that may pass in `wait` seconds."""
    return MeshError(
        Reason.BUDGET_SPENT if limit.kind.money else Reason.RATE_LIMITED,
        f"the {limit.holder}'s {limit.kind} is used up",
        metadata={**limit.metadata, "wait_seconds": f"{wait:.3f}"},
        retry_after=wait,
    )


def spent(limit: Limit, wait: float, usage: Usage, cost: int | None) -> MeshError:
    """A stream that went as far as its limits let it."""
    told = {"prompt_tokens": str(usage.prompt), "completion_tokens": str(usage.completion)}
    if cost is not None:
        told["cost_micros"] = str(cost)
    return MeshError(
        Reason.BUDGET_SPENT,
        f"the {limit.holder}'s {limit.kind} is used up: the answer ends here",
        metadata={**limit.metadata, "wait_seconds": f"{wait:.3f}", **told},
        retry_after=wait,
    )
