"""Every ending settles, wherever it strikes: a request is cancelled at each of its waits, one after the other, and left
after each of its messages. Nothing of it stays: no reservation, no place, no flight, no stream, no probe, no task."""

from __future__ import annotations

import asyncio
import itertools
import json
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from meshlm.cache.config import CacheConfig
from meshlm.cache.service import CacheService
from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig, PriceConfig
from meshlm.router.replicas.concurrency import ConcurrencyLimit
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.risk.config import BreakerConfig
from meshlm.router.risk.standing import Caller
from meshlm.router.routing.config import RouteConfig, RuleConfig, TargetConfig
from meshlm.router.work import Work
from meshlm.v1 import cache_pb2_grpc, inference_pb2
from tests.router.calls import collect
from tests.router.mesh import Mesh, key
from tests.waiting import until

DAY, PLACES = "meshlm:{t}:key:k:micros_per_day", "meshlm:{t}:key:k:concurrent_streams"
BUDGET = 1000


@types.coroutine
def cut(coroutine: Coroutine[Any, Any, Any], waits: set[int], late: bool) -> Generator[Any, Any, bool]:
    """Runs it in this task, which is cancelled at these waits: as they begin, or (`late`) as they end, when what was
    waited for has come and is lost. Returns, if it gets to its end, whether it was cancelled on its way."""
    struck = False
    task, count, error = asyncio.current_task(), itertools.count(1), None
    assert task is not None
    while True:
        try:
            waited = coroutine.throw(error) if error is not None else coroutine.send(None)
        except StopIteration:
            return struck
        if next(count) in waits:
            struck = True
            if late and waited is not None:
                waited.add_done_callback(lambda _: task.cancel())
            else:
                task.cancel()
        error = None
        try:
            yield waited
        except BaseException as caught:
            error = caught


@pytest.fixture
def holder() -> KeyConfig:
    return key(micros_per_day=BUDGET, concurrent_streams=8, risk="enforce")


@pytest.fixture
def router_config() -> dict[str, Any]:
    gone = RuleConfig(targets=(TargetConfig(model="gone"),), fallbacks=("m",))
    return {
        "prices": {name: PriceConfig(prompt=1_000_000, completion=1_000_000) for name in ("m", "gone")},
        "routes": {"falls": RouteConfig(rules=(gone,))},
        "breakers": BreakerConfig(open_seconds=0.001, longest_seconds=900.0),
    }


class Ends:
    """A router amid its peers, with the real cache; and what is left of a request in them."""

    def __init__(self, mesh: Mesh, state: Redis) -> None:
        self.mesh, self.state = mesh, state
        self._numbers = itertools.count()
        self.text = ""
        self.after: list[Callable[[], Any]] = []  # done once a request is over
        self.told = 0  # tokens, as the last message that was read says

    async def run(self, work: Work, most: int | None = None) -> None:
        """Reads the messages of a request, or so many of them."""
        async with aclosing(self.mesh.pipeline.run(work)) as responses:
            number = 0
            async for response in responses:
                self.told = response.usage.prompt_tokens + response.usage.completion_tokens
                if work.lookup.answer is not None:
                    self.told = 0  # nobody pays for it twice
                number += 1
                if number == most:
                    return

    def work(self, *, seconds: float = 120.0, **fields: Any) -> Work:
        self.told, self.text = 0, self.text or f"n {next(self._numbers)}"
        request = inference_pb2.StreamGenerateRequest(generation=self.mesh.generation(self.text, **fields))
        number = next(self._numbers)
        return Work.begin(request, self.mesh.config.callers[0], (f"r{number}", "0" * 32), seconds, self.mesh.config)

    async def nothing_is_left(self, work: Work) -> None:
        """Raises TimeoutError where something stays."""
        for act in self.after:
            act()
        mesh, self.after = self.mesh, []
        await self._until(lambda: not mesh.pipeline._settling)
        await self._until(lambda: not any(replica.in_flight for replica in mesh.fleet.replicas))
        await self._until(lambda: not any(worker.open for worker in mesh.workers) and not mesh.guard.open)
        await self._until(lambda: not any(mesh.pipeline._dispatcher._overload._queues))
        assert not mesh.ledger._leases
        assert not mesh.ledger._owed
        async with asyncio.timeout(60):
            while await self._held():
                await asyncio.sleep(0.002)
        assert int(await self.state.get(DAY) or 0) == self.told, work.outcome

    async def _held(self) -> list[bytes]:
        """What the store keeps of requests that are over, and should not."""
        held = [name async for name in self.state.scan_iter("*:flight:*")]
        records = [name async for name in self.state.scan_iter("meshlm:{t}:reservation:*")]
        held += [name for name in records if await self.state.get(name) != b"settled"]
        if await self.state.zcard(PLACES):
            held.append(PLACES.encode())
        breaker = json.loads(await self.state.get("meshlm:{t}:breaker:key:k") or "{}")
        return held + [b"probe" for _ in breaker.get("probes") or ()]

    @staticmethod
    async def _until(condition: Callable[[], bool]) -> None:
        await until(condition)


@pytest.fixture
async def ends(mesh: Mesh, state: Redis, valkey: str, tmp_path: Path) -> AsyncIterator[Ends]:
    cache = CacheService(CacheConfig(retry_seconds=0.0), StateConfig(redis_url=valkey, timeout_seconds=60.0))
    server = grpc.aio.server(interceptors=[CallInterceptor(Gate())])
    cache_pb2_grpc.add_CacheServiceServicer_to_server(cache, server)
    server.add_insecure_port(f"unix:{tmp_path}/real")
    await server.start()
    channel = open_channel(f"unix:{tmp_path}/real")
    mesh.answers._stub = cache_pb2_grpc.CacheServiceStub(channel)  # type: ignore[no-untyped-call]
    yield Ends(mesh, state)
    await channel.close()
    await server.stop(0)
    await cache.stop()


Prepare = Callable[[Ends], Coroutine[Any, Any, dict[str, Any]]]


async def plain(ends: Ends) -> dict[str, Any]:
    return {}


async def loses_its_worker(ends: Ends) -> dict[str, Any]:
    first = min(ends.mesh.fleet.replicas, key=lambda replica: replica.name)
    for worker in ends.mesh.workers:
        lost = worker.load.replica == first.name
        worker.failures = [MeshError(Reason.ENGINE_LOST, "gone")] if lost else []
    return {"session": "s"}


async def is_answered_by_the_cache(ends: Ends) -> dict[str, Any]:
    ends.text = f"known {next(ends._numbers)}"
    await collect(ends.mesh.stream(ends.text))
    await until(lambda: not ends.mesh.pipeline._settling)
    await ends.state.delete(DAY)
    return {}


async def is_redacted_first(ends: Ends) -> dict[str, Any]:
    ends.mesh.guard.redacts = True
    ends.mesh.guards._redacting[""] = True
    return {}


async def falls_back(ends: Ends) -> dict[str, Any]:
    return {"model": "falls"}


async def is_a_probe(ends: Ends) -> dict[str, Any]:
    caller = Caller("t", "k", "m")
    for number in range(5):
        await ends.mesh.vigilance._standings.note(caller, f"a{number}", risk=0.0, flagged=True)
    await asyncio.sleep(0.002)  # until its breaker is half open
    return {}


async def waits_for_room(ends: Ends) -> dict[str, Any]:
    one = OverloadConfig(first_concurrency=1, least_concurrency=1, most_concurrency=1)
    others = []
    for replica in ends.mesh.fleet.replicas:
        replica.limit = ConcurrencyLimit(one, replica.clock)
        others.append(replica.begin(None, 0))

    async def make_room() -> None:
        await until(lambda: any(ends.mesh.pipeline._dispatcher._overload._queues))
        end_others()

    def end_others() -> None:
        for other in others:
            other.end()

    room = asyncio.ensure_future(make_room())
    ends.after = [room.cancel, end_others]
    return {}


async def spends_its_budget(ends: Ends) -> dict[str, Any]:
    for worker in ends.mesh.workers:
        worker.tokens_each = BUDGET // 3
    return {"sampling": {"max_tokens": BUDGET * 2}}


KINDS = [
    plain,
    loses_its_worker,
    is_answered_by_the_cache,
    is_redacted_first,
    falls_back,
    is_a_probe,
    waits_for_room,
    spends_its_budget,
]


@pytest.mark.parametrize("late", [False, True], ids=["as_it_begins", "as_it_ends"])
@pytest.mark.parametrize("prepare", KINDS)
async def test_a_request_cancelled_at_any_of_its_waits_leaves_nothing_behind(
    ends: Ends, prepare: Prepare, late: bool
) -> None:
    cancelled, whole = 0, False
    for wait in itertools.count(1):
        await ends.state.flushall()
        ends.text = ""
        work = ends.work(**await prepare(ends))
        task = asyncio.ensure_future(_awaited(cut(ends.run(work), {wait}, late)))
        try:
            assert not await task, "a cancel was swallowed: it runs on for nobody"
            whole = True
        except MeshError as error:
            assert error.reason == Reason.BUDGET_SPENT
            whole = True
        except asyncio.CancelledError:
            cancelled += 1
        await ends.nothing_is_left(work)
        if whole:
            break
    assert cancelled > 3


async def test_a_second_cancel_right_after_the_first_changes_nothing(ends: Ends) -> None:
    for wait in range(1, 25):
        await ends.state.flushall()
        ends.text = ""
        work = ends.work()
        with suppress(asyncio.CancelledError):
            await asyncio.ensure_future(_awaited(cut(ends.run(work), {wait, wait + 1, wait + 2}, late=False)))
        await ends.nothing_is_left(work)


@pytest.mark.parametrize("prepare", KINDS)
async def test_a_reader_that_leaves_after_any_message_leaves_nothing_behind(ends: Ends, prepare: Prepare) -> None:
    for most in range(1, 8):
        await ends.state.flushall()
        ends.text = ""
        work = ends.work(**await prepare(ends))
        with suppress(MeshError):
            await ends.run(work, most)
        await ends.nothing_is_left(work)


def of_each_worker(**fields: Any) -> Callable[[Ends], None]:
    def set_up(ends: Ends) -> None:
        for worker in ends.mesh.workers:
            for name, value in fields.items():
                setattr(worker, name, value)

    return set_up


def of_the_guard(**fields: Any) -> Callable[[Ends], None]:
    def set_up(ends: Ends) -> None:
        for name, value in fields.items():
            setattr(ends.mesh.guard, name, value)

    return set_up


FAULTS: dict[str, tuple[Callable[[Ends], None], Reason, dict[str, Any]]] = {
    "the guard is down": (of_the_guard(down=True), Reason.GUARD_UNAVAILABLE, {}),
    "the guard will not judge it": (
        of_the_guard(declines=MeshError(Reason.GUARD_UNAVAILABLE, "no")),
        Reason.GUARD_UNAVAILABLE,
        {},
    ),
    "the input is blocked": (lambda ends: setattr(ends, "text", "attack"), Reason.INJECTION_SUSPECTED, {}),
    "workers are full": (of_each_worker(refusal=MeshError(Reason.OVERLOADED, "full")), Reason.OVERLOADED, {}),
    "workers find it wrong": (
        of_each_worker(refusal=MeshError(Reason.REQUEST_INVALID, "no")),
        Reason.REQUEST_INVALID,
        {},
    ),
    "workers are lost in turn": (
        of_each_worker(failure=MeshError(Reason.ENGINE_LOST, "gone")),
        Reason.ENGINE_LOST,
        {},
    ),
    "a worker talks nonsense": (of_each_worker(shift=1), Reason.INTERNAL, {}),
    "a worker never begins": (of_each_worker(late=asyncio.Event()), Reason.DEADLINE, {"seconds": 0.3}),
    "a worker stops in its midst": (of_each_worker(stalls_at=2), Reason.DEADLINE, {"seconds": 0.3}),
    "a worker never accepts": (of_each_worker(accepts=asyncio.Event()), Reason.DEADLINE, {"seconds": 0.3}),
    "nobody serves it": (lambda ends: None, Reason.MODEL_UNKNOWN, {"model": "unheard-of"}),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_whatever_fails_leaves_nothing_behind(ends: Ends, fault: str) -> None:
    set_up, reason, fields = FAULTS[fault]
    set_up(ends)
    work = ends.work(**fields)
    with pytest.raises(MeshError) as caught:
        await ends.run(work)
    assert caught.value.reason == reason
    await ends.nothing_is_left(work)


async def _awaited(running: Any) -> bool:
    return bool(await running)
