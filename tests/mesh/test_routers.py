"""Several router processes on one port: one account, and nobody refused while they are started anew one by one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.client import AsyncMesh, End, Text
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.plan import Planner
from meshlm.mesh.state import StateFolder
from tests.mesh.test_flows import TWO, Rig, running, until

pytestmark = pytest.mark.mesh

SECRET = "0" * 63 + "5"
ROUTERS = "[mesh]\nrouters = 2\n"


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM__GUARD__MODEL", "rules")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def shared(limits: str = "", **more: Any) -> AsyncIterator[Rig]:
    """A mesh with two routers on one port, and a key with these limits."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    keys = f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{digest}"\n{limits}\n'
    listen = f"127.0.0.1:{free_port()}"
    async with running(ROUTERS + TWO, extra=keys, listen=listen, **more) as rig:
        for name in ("router", "router-2"):
            await until(lambda name=name: _knows_workers(rig, name))
        yield rig


async def _knows_workers(rig: Rig, router: str) -> bool:
    async with AsyncMesh(rig.mesh.address(router), key=SECRET, deadline=10) as mesh:
        return any(model.ready_replicas == 2 for model in await mesh.list_models())


async def ask(rig: Rig, text: str, tokens: int = 5) -> list[Any]:
    """One request over a connection of its own: the kernel gives each to one of the processes."""
    async with AsyncMesh(rig.mesh.target, key=SECRET, deadline=60) as mesh:
        stream = mesh.stream(messages=[("user", text)], temperature=0.0, max_tokens=tokens, cache="bypass")
        return [event async for event in stream]


def served(rig: Rig, router: str) -> int:
    """Requests that a process has ended."""
    lines = rig.folder.log(router).read_text().splitlines()
    return sum(json.loads(line).get("event") == "request" for line in lines if line.startswith("{"))


async def test_both_processes_serve_and_their_limits_are_one_account() -> None:
    async with shared("requests_per_minute = 30", step=0.001) as rig:
        results = await asyncio.gather(*(ask(rig, f"n {n}") for n in range(60)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        reasons = {error.reason if isinstance(error, MeshError) else error for error in refused}
        assert reasons == {Reason.RATE_LIMITED}
        assert 58 - 30 <= len(refused) <= 30  # a token comes back each two seconds
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
        long = [asyncio.ensure_future(ask(rig, f"long {n}", 300)) for n in range(8)]
        await until(lambda: _running(rig, 8))
        before = [rig.mesh.pid(name) for name in ("router", "router-2")]
        rolling = asyncio.ensure_future(rig.mesh.roll_routers())
        asked = 0
        while not rolling.done():
            assert isinstance((await ask(rig, f"n {asked}"))[-1], End)
            asked += 1
        await rolling
        for events in await asyncio.gather(*long):
            assert sum(event.token_count for event in events if isinstance(event, Text)) == 300
        assert asked > 3
        assert not set(before) & {rig.mesh.pid(name) for name in ("router", "router-2")}


async def _running(rig: Rig, count: int) -> bool:
    return sum([(await rig.load(name)).running for name in ("one", "two")]) >= count


def test_a_unix_socket_cannot_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('[router.server]\nlisten = "unix:/r"\n[worker]\nengine = "fake"\n')
    config = MeshConfig(routers=2)
    with pytest.raises(ConfigError, match=r"mesh\.routers"):
        Planner(Source.read(file, {}), config, StateFolder(tmp_path / "s"), environ={}).plan("")


def test_a_worker_cannot_be_called_as_a_router() -> None:
    with pytest.raises(ConfigError, match="another service"):
        Source.read(None, {"MESHLM__MESH__WORKERS": '[{name="router-2"}]'}).section("mesh", MeshConfig)
