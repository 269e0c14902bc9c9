"""Breakers on bursts: how many attacks pass before one opens, and how often ordinary traffic opens one by mistake.

Simulated, in the breaker's own code (`breaker.py`; a test shows that Valkey's script does the same). The peer is what
libraries do: open after 5 flagged requests in a row. Only the last rows depend on the machine: what a look before a
request and a note after it take, beside a bare PING of the same Valkey.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from random import Random

from harness import Row, against, options, report
from ledger import run_valkey

from meshlm.chassis.config import StateConfig
from meshlm.chassis.state import connect
from meshlm.router.risk.breaker import Breaker, State
from meshlm.router.risk.config import BreakerConfig, RiskConfig
from meshlm.router.risk.standing import Caller, Standings

CONFIG = BreakerConfig()
IN_A_ROW = 5
PEER = f"{IN_A_ROW} in a row"
# Attacks after which an attacker gives up.
PATIENCE = 2_000


class Ours:
    def __init__(self) -> None:
        self._breaker = Breaker(CONFIG)

    def opens(self, flagged: bool, now: float) -> bool:
        """Whether this request opened it; `now` in milliseconds."""
        return self._breaker.note("", flagged, now, 1.0)

    @property
    def state(self) -> State:
        return self._breaker.state


class InARow:
    def __init__(self) -> None:
        self._count = 0

    def opens(self, flagged: bool, now: float) -> bool:
        self._count = self._count + 1 if flagged else 0
        return self._count >= IN_A_ROW


def attacks_until_open(make: Callable[[], Ours | InARow], share: float, rate: float, seed: int) -> int:
    """How many attacks pass, the last one included, where this share of `rate` requests a second are attacks."""
    chance, breaker, now, attacks = Random(seed), make(), 0.0, 0
    while attacks < PATIENCE:
        now += chance.expovariate(rate) * 1000
        flagged = chance.random() < share
        attacks += flagged
        if breaker.opens(flagged, now):
            break
    return attacks


def false_trips(make: Callable[[], Ours | InARow], share: float, rate: float, requests: int) -> int:
    """How often harmless traffic, of which this share is flagged by mistake, opens a breaker (a new one each time)."""
    chance, breaker, now, trips = Random(f"{share} {rate}"), make(), 0.0, 0
    for _ in range(requests):
        now += chance.expovariate(rate) * 1000
        if breaker.opens(chance.random() < share, now):
            breaker, trips = make(), trips + 1
    return trips


async def round_trips(count: int) -> list[Row]:
    """Microseconds of a look and of a note, each in turn with a PING, over one client and a unix socket."""
    caller = Caller("t", "k", "m")
    with run_valkey() as url:
        client = connect(StateConfig(redis_url=url))
        standings = Standings(client, RiskConfig(), CONFIG)
        took: dict[str, list[float]] = {"look": [], "note": [], "PING": []}
        for number in range(count):
            name = str(number)
            calls = {
                "PING": client.ping,
                "look": lambda name=name: standings.look(caller, name, caller.no_score),
                "note": lambda name=name: standings.note(caller, name, risk=0.0, flagged=False),
            }
            for kind, call in calls.items():
                begun = time.perf_counter()
                await call()
                took[kind].append((time.perf_counter() - begun) * 1e6)
        await client.aclose()
    pings = took.pop("PING")
    return [
        against(f"a {kind}, one at a time", "us", runs, "PING", pings, less_is_better=True)
        for kind, runs in took.items()
    ]


def main() -> int:
    chosen = options(__doc__ or "")
    tries, requests = (20, 50_000) if chosen.quick else (200, 200_000)
    rows = []
    for share in (0.5, 0.2, 0.1, 0.07):
        for rate in (0.2, 5.0):
            ours = [attacks_until_open(Ours, share, rate, seed) for seed in range(tries)]
            theirs = [attacks_until_open(InARow, share, rate, seed) for seed in range(tries)]
            name = f"attacks until open, {share:.0%} of {rate:g} requests/s"
            value, peer = statistics.median(ours), statistics.median(theirs)
            rows.append(Row(name, "attack", value, tries, (max(ours) - min(ours)) / value, PEER, peer, value / peer))
    for share in (0.005, 0.01, 0.02, 0.03, 0.05):
        for rate in (1.0, 20.0):
            ours_, theirs_ = (false_trips(make, share, rate, requests) for make in (Ours, InARow))
            name = f"false trips, {share:.1%} flagged, {rate:g} requests/s"
            rows.append(Row(name, f"in {requests:,}", ours_, requests, 0.0, PEER, theirs_))
    rows += asyncio.run(round_trips(300 if chosen.quick else 3000))
    report("breakers", rows, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
