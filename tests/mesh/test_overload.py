"""More work than a worker can do, and regions, on a real mesh with the fake engine."""

from __future__ import annotations

import asyncio
import hashlib
import urllib.request
from collections import Counter
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.spans import read_trace
from meshlm.mesh.client import AsyncMesh, Start
from tests.mesh.rig import DEADLINE, LONG, ONE, TWO, Rig, running
from tests.ports import free_port
from tests.waiting import until

pytestmark = pytest.mark.mesh

SECRET = "0" * 63 + "7"


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's letters are no text to be judged."""
    monkeypatch.setenv("MESHLM__GUARD__MODEL", "rules")


def holder(**fields: str) -> str:
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    return f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{digest}"\n{lines}'


async def enter(rig: Rig) -> None:
    rig.client = AsyncMesh(rig.mesh.target, key=SECRET, deadline=DEADLINE)

    async def ready() -> bool:
        return any(m.ready_replicas for m in await rig.client.list_models())

    await until(ready)


async def start_of(rig: Rig, question: str) -> Start:
    events = [event async for event in rig.stream(question, max_tokens=2)]
    assert isinstance(events[0], Start)
    return events[0]


PLACES = "[router.overload]\nfirst_concurrency = 4\nleast_concurrency = 4\nmost_concurrency = 4\nsheddable_queue = 3\n"
PLACES += "queue_seconds = 60.0\n"


async def test_batch_is_shed_first_and_critical_goes_on() -> None:
    extra = holder(priority='"critical"') + PLACES
    async with running(ONE, step=0.02, extra=extra) as rig:
        await enter(rig)

        async def ask(priority: Any, number: int, tokens: int = 20) -> Any:
            try:
                return await rig.text(f"{priority} {number}", priority=priority, max_tokens=tokens)
            except MeshError as error:
                return error

        endless = [asyncio.create_task(ask("batch", number, LONG)) for number in range(2)]
        await until(lambda: _running(rig, 2))  # and no more of them may
        batch = [asyncio.create_task(ask("batch", number)) for number in range(2, 20)]
        await until(lambda: sum(task.done() for task in batch) == 15)  # 3 wait: the others are refused at once
        urgent = await asyncio.gather(*(ask("critical", number) for number in range(12)))
        assert all(isinstance(answer, str) and len(answer) == 20 for answer in urgent)
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        answers = await asyncio.gather(*batch)
        refused = [answer for answer in answers if isinstance(answer, MeshError)]
        assert {error.reason for error in refused} == {Reason.OVERLOADED}
        assert {error.metadata["priority"] for error in refused} == {"sheddable"}
        assert all(error.retry_after for error in refused)
        assert len(refused) == 15
        assert await rig.text("and then", priority="batch", max_tokens=5)


async def test_a_request_that_waited_says_so_in_its_trace() -> None:
    port = free_port()
    admin = f'admin_listen = "127.0.0.1:{port}"\n'
    async with running(ONE, step=0.02, extra=admin + holder() + PLACES) as rig:
        await enter(rig)
        starts: list[Start] = []

        async def ask(number: int, tokens: int = 30) -> None:
            stream = rig.stream(f"n {number}", max_tokens=tokens, cache="bypass")
            starts.extend([e async for e in stream if isinstance(e, Start)])

        first = [asyncio.create_task(ask(number, LONG)) for number in range(3)]
        await until(lambda: _running(rig, 3))  # 3 of 4 places are for requests that are not critical
        others = asyncio.gather(*(ask(number) for number in range(3, 9)))
        await until(lambda: _queued(port, 6))
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        await others

        def waits() -> list[Any]:
            spans = [span for start in starts for span in read_trace(rig.folder.spans, start.trace_id)]
            return [span for span in spans if span.name == "router.queue"]

        await until(lambda: len(waits()) == 6)
        assert {span.attributes["meshlm.priority"] for span in waits()} == {"default"}
        await until(rig.idle)


async def _queued(port: int, count: int) -> bool:
    """Whether so many requests wait in the router whose metrics are told there."""
    with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith("meshlm_overload_queued")] == [count]


async def _running(rig: Rig, count: int) -> bool:
    return (await rig.load()).running == count


async def test_prompts_with_one_beginning_go_where_it_is_cached() -> None:
    # Eight steps of prefill, against the one that a sequence in the other's hands would be worth. Neither worker is new
    # for longer than the other.
    alike = "[router.replicas]\nslow_start_seconds = 0.0\n"
    async with running(TWO, step=0.02, extra=alike + holder()) as rig:
        await enter(rig)

        async def known() -> bool:
            told = await rig.client.explain(messages=[("user", house + "?")], temperature=0.0, max_tokens=2)
            return any(candidate.cached_tokens > 500 for candidate in told.routing.considered)

        house = "These rules begin every prompt of this caller, and are long enough to matter. " * 24
        first = await start_of(rig, house + "0")
        home = first.routing.replica
        await until(known)  # the router has heard what the worker keeps
        reasons = Counter[str]()
        for number in range(1, 8):
            start = await start_of(rig, house + str(number))
            assert start.routing.replica == home, (number, str(start.routing))
            reasons[start.routing.reason] += 1
            chosen, other = start.routing.considered
            assert chosen.cached_tokens > 500 > other.cached_tokens
        assert reasons == {"prefix": 7}


async def test_an_eu_tenant_reaches_no_us_worker_even_when_the_eu_one_dies() -> None:
    workers = (
        '[[mesh.workers]]\nname = "us"\noverrides = { region = "us-east-1" }\n'
        '[[mesh.workers]]\nname = "eu"\noverrides = { region = "eu-west-1" }\n'
    )
    extra = holder(regions='["eu"]')
    async with running(workers, step=0.001, extra=extra) as rig:
        await enter(rig)
        with pytest.raises(MeshError) as caught:
            await rig.text("hello", max_tokens=3)
        assert (caught.value.reason, caught.value.metadata["place"]) == (Reason.REGION_NOT_ALLOWED, "router")
    async with running(workers, step=0.001, extra='[router]\nregion = "eu-west-1"\n' + extra) as rig:
        await enter(rig)
        for number in range(4):
            start = await start_of(rig, f"n {number}")
            assert (start.routing.replica, start.routing.region) == ("eu", "eu-west-1")
        steps = (await rig.load("us")).counters.steps
        reasons = Counter[str]()
        async with rig.without("eu"):
            while Reason.NO_REPLICA_IN_REGION not in reasons:
                with pytest.raises(MeshError) as caught:
                    await rig.text("hello", max_tokens=3, cache="bypass")
                reasons[caught.value.reason] += 1
        assert (await rig.load("us")).counters.steps == steps == 0
