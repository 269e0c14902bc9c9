"""Workers and engines as real processes, with the fake engine, and what tests ask of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, from_rpc_error
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2, worker_pb2_grpc
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import FakeSettings
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_process import EngineSettings

STARTING_SECONDS = 180


class Worker:
    """A running worker and a channel to it."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.address = f"unix:{folder}/worker"
        said = {"engine": "fake", "server__listen": self.address, "server__admin_listen": ""} | config
        variables = {f"MESHLM__WORKER__{key}".upper(): str(value) for key, value in said.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "meshlm.worker.main"],
            env={**os.environ, **variables, "MESHLM__TELEMETRY__LOG_LEVEL": "error"},
        )
        self.channel = open_channel(self.address)
        self.stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def call(self, prompt: str = "hello", timeout: float | None = 120, **sampling: Any) -> Any:
        drawn = pb.Sampling(**{"temperature": 0, "max_tokens": 6} | sampling)
        generation = pb.Generation(input=pb.Input(prompt=prompt), sampling=drawn, return_token_ids=True)
        return self.stub.RunGeneration(worker_pb2.RunGenerationRequest(generation=generation), timeout=timeout)

    async def state(self) -> worker_pb2.WatchLoadResponse:
        watch = self.stub.WatchLoad(worker_pb2.WatchLoadRequest(watcher="test"), wait_for_ready=True)
        state: worker_pb2.WatchLoadResponse = await watch.read()
        watch.cancel()
        return state

    async def until(self, condition: Callable[[worker_pb2.WatchLoadResponse], bool], seconds: float = 120.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition(await self.state()):
                await asyncio.sleep(0.02)

    async def serving(self) -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service="meshlm.v1.WorkerService"))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def end(self) -> int:
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, 120)


@asynccontextmanager
async def running(**config: object) -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="meshlm-") as folder:
        worker = Worker(Path(folder), **config)
        try:
            await worker.until(lambda state: state.ready, STARTING_SECONDS)
            yield worker
        finally:
            await worker.channel.close()
            worker.process.kill()
            worker.process.wait()


async def error_of(awaitable: Any) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


@asynccontextmanager
async def engine(**fake: float) -> AsyncIterator[EngineClient]:
    """An engine for two sequences at once and two that wait."""

    async def on_able(able: bool, why: str) -> None: ...

    settings = EngineSettings(
        kind="fake",
        runner=msgspec.to_builtins(FakeSettings(**fake)),  # type: ignore[arg-type]
        scheduler=SchedulerSettings(max_running=2, max_waiting=2),
        log_level="error",
    )
    client = EngineClient(settings, on_able=on_able, backoff_seconds=0.05)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()
        assert client.blocks_left in (0, None)
