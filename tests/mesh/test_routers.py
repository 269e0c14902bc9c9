"""Several router processes on one port: one account, and nobody refused while they are started anew one by one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.client import AsyncMesh, End, Text
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.plan import Planner
from meshlm.mesh.state import StateFolder
from meshlm.v1 import worker_pb2, worker_pb2_grpc
from tests.mesh.rig import DEADLINE, ONE, TWO, Rig, running
from tests.ports import free_port
from tests.waiting import until

pytestmark = pytest.mark.mesh

SECRET = "0" * 63 + "5"


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM__GUARD__MODEL", "rules")


@asynccontextmanager
async def shared(
    limits: str = "", *, routers: int = 2, workers: str = TWO, before: str = "", **more: Any
) -> AsyncIterator[Rig]:
    """A mesh with several routers on one port, and a key with these limits; `before`: more of the routers."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    keys = f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{digest}"\n{limits}\n'
    listen = f"127.0.0.1:{free_port()}"
    async with running(f"[mesh]\nrouters = {routers}\n" + workers, extra=before + keys, listen=listen, **more) as rig:
        for number in range(routers):
            name = f"router-{number + 1}" if number else "router"
            await until(lambda name=name: _knows_workers(rig, name, workers.count("[[")))
        yield rig


async def _knows_workers(rig: Rig, router: str, count: int) -> bool:
    async with AsyncMesh(rig.mesh.address(router), key=SECRET, deadline=DEADLINE) as mesh:
        return any(model.ready_replicas == count for model in await mesh.list_models())


async def ask(rig: Rig, text: str, tokens: int = 5) -> list[Any]:
    """One request over a connection of its own: the kernel gives each to one of the processes."""
    async with AsyncMesh(rig.mesh.target, key=SECRET, deadline=DEADLINE) as mesh:
        stream = mesh.stream(messages=[("user", text)], temperature=0.0, max_tokens=tokens, cache="bypass")
        return [event async for event in stream]


def served(rig: Rig, router: str) -> int:
    """Requests that a process has ended."""
    lines = rig.folder.log(router).read_text().splitlines()
    return sum(json.loads(line).get("event") == "request" for line in lines if line.startswith("{"))


async def test_both_processes_serve_and_their_limits_are_one_account() -> None:
    async with shared("requests_per_minute = 30", step=0.001) as rig:
        began = time.monotonic()
        results = await asyncio.gather(*(ask(rig, f"n {n}") for n in range(60)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        reasons = {error.reason if isinstance(error, MeshError) else error for error in refused}
        assert reasons == {Reason.RATE_LIMITED}
        back = (time.monotonic() - began) / 2 + 1  # a token comes back each two seconds
        assert 30 - back <= len(refused) <= 30
        await until(lambda: served(rig, "router") + served(rig, "router-2") == 60)
        assert min(served(rig, "router"), served(rig, "router-2")) > 5


async def test_a_killed_process_leaves_the_port_to_the_other() -> None:
    async with shared() as rig:
        pid = rig.mesh.pid("router")
        rig.kill("router")
        await until(lambda: not psutil.pid_exists(pid))  # its socket is closed: nobody is given to it any more
        for n in range(10):
            assert isinstance((await ask(rig, f"n {n}"))[-1], End)


async def test_routers_started_anew_one_by_one_break_no_stream_and_refuse_nobody() -> None:
    async with shared(step=0.01) as rig:
        long = [asyncio.ensure_future(ask(rig, f"long {n}", 600)) for n in range(8)]
        await until(lambda: _running(rig, 8))
        before = [rig.mesh.pid(name) for name in ("router", "router-2")]
        rolling = asyncio.ensure_future(rig.mesh.roll_routers())
        asked = 0
        while not rolling.done():
            assert isinstance((await ask(rig, f"n {asked}"))[-1], End)
            asked += 1
        await rolling
        for events in await asyncio.gather(*long):
            assert sum(event.token_count for event in events if isinstance(event, Text)) == 600
        assert asked > 3
        assert not set(before) & {rig.mesh.pid(name) for name in ("router", "router-2")}


async def _running(rig: Rig, count: int) -> bool:
    return sum([(await rig.load(name)).running for name in ("one", "two")]) >= count


def logged(rig: Rig, router: str, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in rig.folder.log(router).read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


async def explained(rig: Rig, router: str) -> Any:
    """Where a request of this session would go, as a router sees it."""
    async with AsyncMesh(rig.mesh.address(router), key=SECRET, deadline=DEADLINE) as mesh:
        return (await mesh.explain(messages=[("user", "hi")], session="s")).routing


EJECTING = "[router.replicas]\neject_failures = 1\neject_seconds = 300.0\n[router.streams]\nresumes = 0\n"


async def test_a_worker_that_two_routers_found_failing_is_left_out_by_the_third() -> None:
    """Its engine is killed by what they send there; the third has sent nothing."""
    async with shared(routers=3, before=EJECTING, step=0.005) as rig:
        home = (await explained(rig, "router-3")).replica
        for router in ("router", "router-2"):
            await until(lambda router=router: _goes_to(rig, router, home))  # its engine is back
            async with AsyncMesh(rig.mesh.address(router), key=SECRET, deadline=DEADLINE) as mesh:
                with pytest.raises(MeshError) as caught:
                    await mesh.generate(messages=[("user", "!kill")], session="s", cache="bypass", max_tokens=50)
            assert caught.value.reason == Reason.ENGINE_LOST
            await until(lambda router=router: _leaves_out(rig, router, home))  # at a choice, once it is ready again
        await until(lambda: _leaves_out(rig, "router-3", home))
        assert not served(rig, "router-3")


async def _goes_to(rig: Rig, router: str, worker: str) -> bool:
    return bool((await explained(rig, router)).replica == worker)


async def _leaves_out(rig: Rig, router: str, worker: str) -> bool:
    considered = (await explained(rig, router)).considered
    return any((candidate.replica, candidate.excluded) == (worker, "ejected") for candidate in considered)


PLACES = "[router.overload]\nfirst_concurrency = 8\nleast_concurrency = 2\nmost_concurrency = 8\n"


async def test_two_routers_send_a_worker_no_more_than_one_would() -> None:
    async with shared('priority = "critical"', workers=ONE, before=PLACES, step=0.01) as rig:
        for router in ("router", "router-2"):
            await until(lambda router=router: _places(rig, router)[-1:] == [4])
        most = 0
        async with asyncio.timeout(120):
            while most < 8:  # requests that came slowly found each other's places free
                asking = asyncio.gather(*(flood(rig, router, 8) for router in ("router", "router-2")))
                most = max(most, await peak(rig, asking))
        assert most == 8
        told = len(logged(rig, "router", "routers at a worker"))
        rig.kill("router-2")
        await until(lambda: [n["routers"] for n in logged(rig, "router", "routers at a worker")[told:]] == [1, 2])
        alone = logged(rig, "router", "routers at a worker")[told]
        assert alone["places"] > 4  # all of what both had learnt


def _places(rig: Rig, router: str) -> list[int]:
    """What a router has had of a worker's places, one after the other."""
    return [int(note["places"]) for note in logged(rig, router, "routers at a worker")]


async def flood(rig: Rig, router: str, count: int) -> None:
    """So many requests at once to one of the routers."""
    async with AsyncMesh(rig.mesh.address(router), key=SECRET, deadline=DEADLINE) as mesh:
        asked = (
            mesh.generate(messages=[("user", f"{router} {n}")], max_tokens=60, cache="bypass", temperature=0.0)
            for n in range(count)
        )
        await asyncio.gather(*asked)


async def peak(rig: Rig, work: asyncio.Future[Any]) -> int:
    """Most sequences that the worker had in its hands while this went on."""
    channel, most = open_channel(rig.mesh.address("one")), 0
    call: Any = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(  # type: ignore[call-arg]
        worker_pb2.WatchLoadRequest(watcher="test"), wait_for_ready=True
    )
    while not work.done():
        state = await call.read()
        most = max(most, state.running + state.waiting)
    await work
    call.cancel()
    await channel.close()
    return most


def test_a_unix_socket_cannot_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('[router.server]\nlisten = "unix:/r"\n[worker]\nengine = "fake"\n')
    config = MeshConfig(routers=2)
    with pytest.raises(ConfigError, match=r"mesh\.routers"):
        Planner(Source.read(file, {}), config, StateFolder(tmp_path / "s"), environ={}).plan("")


def test_a_worker_cannot_be_called_as_a_router() -> None:
    with pytest.raises(ConfigError, match="another service"):
        Source.read(None, {"MESHLM__MESH__WORKERS": '[{name="router-2"}]'}).section("mesh", MeshConfig)
