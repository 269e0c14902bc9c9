"""A mesh of real processes with the fake engine, a client of it, and ways to look and reach into it."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import Source
from meshlm.mesh.client import AsyncMesh, Text
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.launcher import LocalMesh, plan_mesh
from meshlm.mesh.process import ProcessEvent, Started
from meshlm.mesh.state import StateFolder
from meshlm.v1 import generation_pb2, inference_pb2, worker_pb2, worker_pb2_grpc
from tests.mesh.fakes import PATIENT
from tests.waiting import until

CONFIG = """
[worker]
engine = "fake"
hang_seconds = {hang}
stream_interval = {interval}
[worker.fake]
step_seconds = {step}
total_blocks = 512
[router.server]
listen = "{listen}"
"""
ONE = '[[mesh.workers]]\nname = "one"\n'
# The fake's tokens are bytes: with the usual windows a short answer would be judged, and come, as a whole.
WINDOWS = "[guard.policies.default]\nanswer_windows = [1]\n"
NO_RESUMES = "[router.streams]\nresumes = 0\n"  # by the router
DEADLINE = 240  # seconds that a client waits: nobody's test is how soon an answer comes
LONG = 2000  # tokens of a stream that is broken off: it must not have ended before whoever breaks it has read of it
TWO = ONE + '[[mesh.workers]]\nname = "two"\n'


class Rig:
    """A running mesh, a client of it, and ways to look inside."""

    def __init__(self, mesh: LocalMesh, folder: StateFolder, held: set[str]) -> None:
        """`held`: services whose next process is to be stopped as soon as it is there."""
        self.mesh = mesh
        self.held = held
        self.folder = folder
        self.client = AsyncMesh(mesh.target, key=mesh.key, deadline=DEADLINE)

    async def load(self, worker: str = "one") -> worker_pb2.WatchLoadResponse:
        """What a worker says of itself now."""
        channel = open_channel(self.mesh.address(worker))
        try:
            call = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(  # type: ignore[call-arg]
                worker_pb2.WatchLoadRequest(watcher="test"), timeout=60, wait_for_ready=True
            )
            return await call.read()  # type: ignore[attr-defined,no-any-return]
        finally:
            await channel.close()

    async def ready(self) -> bool:
        """Whether the router knows of a worker that takes requests."""
        return any(model.ready_replicas for model in await self.client.list_models())

    async def idle(self, worker: str = "one") -> bool:
        """Whether a worker has nothing left to compute, and nothing in its memory for it."""
        state = await self.load(worker)
        return not state.running and not state.waiting and state.free_blocks == state.total_blocks

    def engine(self, worker: str = "one") -> psutil.Process:
        """The engine process of a worker."""
        (engine,) = psutil.Process(self.mesh.pid(worker)).children()
        return engine

    def kill(self, name: str) -> None:
        os.kill(self.mesh.pid(name), signal.SIGKILL)

    @asynccontextmanager
    async def without(self, name: str) -> AsyncIterator[None]:
        """While a service is gone: the process that the launcher starts in its place is stopped before it serves."""
        self.held.add(name)
        self.kill(name)
        try:
            yield
        finally:
            await until(lambda: name not in self.held)
            os.kill(self.mesh.pid(name), signal.SIGCONT)

    async def text(self, question: str, **asked: Any) -> str:
        return "".join([e.text async for e in self.stream(question, **asked) if isinstance(e, Text)])

    def stream(self, question: str, **asked: Any) -> Any:
        return self.client.stream(messages=[("user", question)], **{"temperature": 0.0, "max_tokens": 60, **asked})

    def call(self, sampling: dict[str, Any], **more: Any) -> Any:
        """The call itself, as its messages come: for what the client library does by itself."""
        chat = generation_pb2.Chat(messages=[generation_pb2.Message(role="user", content="hello")])
        source, bypass = generation_pb2.Input(chat=chat), generation_pb2.CACHE_POLICY_BYPASS
        asked = generation_pb2.Sampling(**sampling)
        generation = generation_pb2.Generation(input=source, sampling=asked, cache_policy=bypass)
        request = inference_pb2.StreamGenerateRequest(generation=generation, **more)
        metadata = [("authorization", f"Bearer {self.client._key}")]
        return self.client._stub.StreamGenerate(request, metadata=metadata)


@asynccontextmanager
async def running(
    workers: str = ONE,
    step: float = 0.02,
    extra: str = "",
    interval: float = 0.1,
    listen: str = "",
    hang: float = 60.0,
) -> AsyncIterator[Rig]:
    """`listen`: of the router; empty: a unix socket. `hang`: seconds without a step after which an engine hangs."""
    with TemporaryDirectory(prefix="meshlm-") as root:
        file = Path(root) / "mesh.toml"
        listen = listen or f"unix:{root}/router"
        windows = "" if "[guard" in extra else WINDOWS
        config_text = CONFIG.format(listen=listen, step=step, interval=interval, hang=hang)
        file.write_text(f"{workers}{config_text}{extra}\n{windows}")
        folder = StateFolder(Path(root) / "s")
        folder.acquire()
        told = Source.read(file, {}).section("mesh", MeshConfig)
        config = MeshConfig(ready_seconds=200, stop_seconds=150, workers=told.workers, routers=told.routers)
        plan = plan_mesh(Source.read(file, {}), folder, config, config_path=file)
        held: set[str] = set()

        def hold(event: ProcessEvent) -> None:
            if isinstance(event, Started) and event.name in held:
                os.kill(event.pid, signal.SIGSTOP)
                held.remove(event.name)

        try:
            async with LocalMesh(plan, folder, config, environ={**PATIENT, **os.environ}, tell=hold) as mesh:
                rig = Rig(mesh, folder, held)
                yield rig
                await rig.client.close()
        finally:
            folder.release()
