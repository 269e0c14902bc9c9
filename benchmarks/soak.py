"""Use the mesh cruelly, and see whether it keeps its word.

Callers of several tenants ask at random (streams, unary calls, several choices, cancels, slow readers, resumes, spent
budgets, flagged prompts, cached ones, tool calls, bad input, no time) while a hand of chance kills and stops workers, a
router, the guard, the cache and the store. Then all must be quiet: docs/soak.md says what is checked. Ends with 1, and
the seed, where something is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import soak_checks as checks
from harness import Row, option_parser, report
from soak_calls import KINDS, Call, Caller, allowed
from soak_mesh import MODEL, ROUTERS, TENANTS, WORKERS, SoakMesh, running, until

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError
from meshlm.mesh.client import AsyncMesh

LONGEST_STOP = 6.0  # seconds
PAUSE = 1.2  # seconds between two faults, in the mean
MOST_PATIENCE = 1.0  # seconds that a caller waits who is told to
BURST = 40  # calls at once of a caller that is in a hurry, now and then
MOST_KILLS = 3  # of one process: the launcher gives up on one that dies five times in a minute
TARGETS = (*WORKERS, *WORKERS, *ROUTERS, "guard", "cache", "valkey")


class Hand:
    """Chooses what is done to whom from a seed; processes that serve no more are left alone until they do."""

    def __init__(self, soak: SoakMesh, chance: random.Random) -> None:
        self._soak = soak
        self._chance = chance
        self._struck: set[str] = set()  # now
        self._kills: Counter[str] = Counter()
        self._acts: set[asyncio.Task[None]] = set()

    async def work(self, seconds: float) -> None:
        """For so long; returns when all is whole again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(0.3, 2 * PAUSE - 0.3))
            kind = self._chance.choice(("kill", "stop", "stop", "renew"))
            if targets := [target for target in TARGETS if self._may(kind, target)]:
                self._acts.add(asyncio.create_task(self._act(kind, self._chance.choice(targets))))
        await asyncio.gather(*self._acts)

    def _may(self, kind: str, target: str) -> bool:
        """One router and one worker are always left in peace, and so is what was killed too often."""
        fellows = next((group for group in (WORKERS, ROUTERS) if target in group), None)
        if fellows is not None and len({*self._struck, target} & set(fellows)) == len(fellows):
            return False
        return target not in self._struck and (kind != "kill" or self._kills[target] < MOST_KILLS)

    async def _act(self, kind: str, target: str) -> None:
        self._struck.add(target)
        seconds, engine = self._chance.uniform(0.1, LONGEST_STOP), self._chance.random() < 0.4
        try:
            if kind == "stop":
                await self._soak.stop_for(target, seconds)
            elif kind == "renew":
                await self._soak.renew(target)
            else:
                self._kills[target] += 1
                await self._soak.kill(target, engine=engine and target in WORKERS)
        finally:
            self._struck.discard(target)


async def use(soak: SoakMesh, number: int, seed: int, seconds: float, calls: list[Call]) -> None:
    """One caller: a call after the other, over a connection of its own that it sometimes gives up."""
    chance = random.Random(f"{seed}/{number}")
    until, life = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        life += 1
        async with open_channel(soak.mesh.target) as channel:
            caller = Caller(channel, soak.mesh.target, f"c{number}.{life}", chance)
            for _ in range(chance.randrange(3, 30)):
                if time.monotonic() >= until:
                    return
                count = BURST if chance.random() < 0.01 else 1
                await asyncio.gather(*[follow(caller, caller.make(), calls) for _ in range(count)])
                await asyncio.sleep(chance.uniform(0, 0.15))


async def follow(caller: Caller, call: Call | None, calls: list[Call]) -> None:
    """A call, and those that go on with it."""
    for _ in range(4):
        if call is None:
            return
        calls.append(call)
        await caller.run(call)
        await asyncio.sleep(min(call.retry_after, MOST_PATIENCE))
        call = caller.resumed(call)


async def round_of(soak: SoakMesh, name: str, seed: int, calls: list[Call]) -> None:
    """Each kind of call some times, with nothing in its way."""
    async with open_channel(soak.mesh.target) as channel:
        caller = Caller(channel, soak.mesh.target, name, random.Random(f"{seed}/{name}"))
        made = [caller.make(kind) for kind in KINDS for _ in range(3)]
        await asyncio.gather(*(follow(caller, call, calls) for call in made))


async def whole(soak: SoakMesh) -> None:
    """Until all serve, and each router knows all workers and leaves none out."""
    for name in (*soak.names, "valkey"):
        await asyncio.wait_for(soak.ready(name), 60)

    async def knows(router: str) -> bool:
        async with AsyncMesh(soak.mesh.address(router), key=TENANTS[0].secret, deadline=20) as mesh:
            ready = {model.name: model.ready_replicas for model in await mesh.list_models()}
        return ready.get(MODEL) == len(WORKERS)

    async def answers(router: str) -> bool:
        """Its breakers tried again: what is asked meanwhile would be refused, though nobody is struck any more."""
        async with AsyncMesh(soak.mesh.address(router), key=TENANTS[0].secret, deadline=20) as mesh:
            with contextlib.suppress(MeshError):
                return bool(await mesh.generate(messages=[("user", router)], max_tokens=1, cache="bypass"))
            return False

    for router in ROUTERS:
        await until(lambda router=router: knows(router), 90)
        await until(lambda router=router: answers(router), 30)


async def soak_for(seconds: float, clients: int, seed: int, keep: Path | None) -> tuple[list[Row], list[str]]:
    calls: list[Call] = []
    calm: list[Call] = []
    async with running() as soak:
        await whole(soak)
        await round_of(soak, "before", seed, calm)
        before = checks.sizes(soak)
        hand = Hand(soak, random.Random(f"{seed}/hand"))
        callers = [use(soak, number, seed, seconds, calls) for number in range(clients)]
        await asyncio.gather(hand.work(seconds), *callers)
        await whole(soak)
        await round_of(soak, "after", seed, calm)
        wrong = await judge(soak, calls, calm, before)
        started = time.monotonic()
        await soak.mesh.stop()
        stopped = time.monotonic() - started
        wrong += soak.unclean
        wrong += list(checks.logs(soak))
        if keep is not None:
            shutil.copytree(soak.folder.root, keep, ignore=shutil.ignore_patterns("run"), dirs_exist_ok=True)
        tell(soak, [*calls, *calm])
    rows = [
        Row("requests", "1", len(calls) + len(calm), 1, 0.0),
        Row("faults", "1", len(soak.faults), 1, 0.0),
        Row("violations", "1", len(wrong), 1, 0.0, limit=0.0),
        Row("seconds to stop", "s", stopped, 1, 0.0),
    ]
    return rows, wrong


async def judge(soak: SoakMesh, calls: list[Call], calm: list[Call], before: dict[str, checks.Size]) -> list[str]:
    wrong = list(checks.endings(soak, calls))
    for call in calm:
        wrong += [f"{call.id} ({call.kind}): {fault}" for fault in call.wrong]
        if call.ending not in allowed(call):
            wrong.append(f"in peace {call.id} ({call.kind}) ended with {call.ending}, wanted {call.wanted}")
    wrong += await gathered(checks.quiet(soak))
    try:
        await until(lambda: not checks.connections(soak))
    except TimeoutError:
        wrong += checks.connections(soak)
    log = checks.records(soak)
    wrong += list(checks.audit(soak, [*calls, *calm], log))
    wrong += await gathered(checks.ledger(soak, [*calls, *calm], log))
    try:
        await until(lambda: not list(checks.spans(soak, calm)))
    except TimeoutError:
        wrong += list(checks.spans(soak, calm))
    return wrong + list(checks.growth(before, checks.sizes(soak)))


async def gathered(lines: AsyncIterator[str]) -> list[str]:
    return [line async for line in lines]


def tell(soak: SoakMesh, calls: list[Call]) -> None:
    _table("kinds of call", (call.kind for call in calls))
    _table("endings", (call.ending for call in calls))
    _table("faults", (f"{fault.kind} {fault.target}" for fault in soak.faults))


def _table(title: str, things: Iterable[str]) -> None:
    print(f"{title}:")
    for name, count in sorted(Counter(things).items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"  {count:6d}  {name}")


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--seconds", type=float, metavar="N", help="how long (60; 15 with --quick)")
    parser.add_argument("--clients", type=int, default=24, metavar="N", help="callers at a time")
    parser.add_argument("--seed", type=int, help="what a run prints where something is wrong")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the logs and spans there")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else secrets.randbits(32)
    seconds = chosen.seconds or (15.0 if chosen.quick else 60.0)
    print(f"seed {seed}, {seconds:g} s, {chosen.clients} callers", flush=True)
    rows, wrong = asyncio.run(soak_for(seconds, chosen.clients, seed, chosen.keep))
    report("soak", rows, chosen.json, seed=seed, violations=wrong)
    for line in wrong:
        print(f"VIOLATION {line}")
    if wrong:
        print(f"to repeat: benchmarks/soak.py --seconds {seconds:g} --clients {chosen.clients} --seed {seed}")
        sys.exit(1)


if __name__ == "__main__":
    main()
