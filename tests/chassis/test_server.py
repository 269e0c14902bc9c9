"""The life of a service's process, with real signals."""

from __future__ import annotations

import asyncio
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import Reason, from_rpc_error
from meshlm.v1 import inference_pb2, inference_pb2_grpc
from tests.ports import free_port

pytestmark = pytest.mark.mesh

SCRIPT = str(Path(__file__).with_name("service_process.py"))
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/s"
        self.channel = open_channel(self.address)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.process: asyncio.subprocess.Process

    async def start(self, mode: str, **environ: str) -> None:
        settings = {"MESHLM__ROUTER__LISTEN": self.address, **environ}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, SCRIPT, mode, env=settings, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )

    async def status(self, wanted: int) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    answer = await self.health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                except grpc.RpcError:
                    answer = None
                if answer is not None and answer.status == wanted:
                    return
                await asyncio.sleep(0.02)

    async def end(self) -> tuple[int, str, str]:
        async with asyncio.timeout(60):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Process]:
    made = Process(tmp_path)
    yield made
    await made.channel.close()
    if made.process.returncode is None:
        made.process.kill()
        await made.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stream_in_flight_ends_whole_before_the_process_does(
    service: Process, number: int, tmp_path: Path
) -> None:
    go_on = tmp_path / "go-on"
    await service.start("plain")
    await service.status(SERVING)
    call = service.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(resume_from=20, resume_of=str(go_on)))
    seen = [(await call.read()).usage.completion_tokens]
    service.process.send_signal(number)
    await service.status(NOT_SERVING)
    with pytest.raises(grpc.RpcError) as caught:
        await service.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(resume_from=1)).read()
    assert from_rpc_error(caught.value).reason == Reason.DRAINING
    go_on.touch()
    while (response := await call.read()) is not grpc.aio.EOF:
        seen.append(response.usage.completion_tokens)
    assert seen == list(range(20))
    code, out, _ = await service.end()
    assert (code, out.split()) == (0, ["drain", "stop"])


async def test_a_call_that_outlives_the_grace_time_is_cut_and_the_exit_is_clean(service: Process) -> None:
    await service.start("plain", MESHLM__ROUTER__GRACE_SECONDS="0.2")
    await service.status(SERVING)
    call = service.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(resume_from=10_000))
    await call.read()
    service.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    assert (await service.end())[0] == 0


async def test_a_signal_while_it_loads_ends_it_cleanly(service: Process) -> None:
    await service.start("slow")
    await service.status(NOT_SERVING)
    service.process.send_signal(signal.SIGTERM)
    code, out, _ = await service.end()
    assert (code, out.split()) == (0, ["stop"])


async def test_a_failed_start_exits_with_1_and_its_log_has_no_exception_text(service: Process) -> None:
    await service.start("broken")
    code, _, err = await service.end()
    assert code == 1
    assert "RuntimeError" in err
    assert "secret" not in err


async def test_a_bad_configuration_exits_with_2_and_names_the_key(service: Process) -> None:
    await service.start("plain", MESHLM__ROUTER__GRACE_SECONDS="soon")
    code, _, err = await service.end()
    assert code == 2
    assert "router.grace_seconds" in err


async def test_the_admin_port_tells_readiness_and_metrics(service: Process) -> None:
    port = free_port()
    await service.start("plain", MESHLM__ROUTER__ADMIN_LISTEN=f"127.0.0.1:{port}")
    await service.status(SERVING)
    call = service.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(resume_from=1))
    while await call.read() is not grpc.aio.EOF:
        pass
    assert await _get(port, "/readyz") == (200, "ready\n")
    status, text = await _get(port, "/metrics")
    assert status == 200
    assert "rpc_server_duration_seconds_count{" in text
    assert (await _get(port, "/nothing"))[0] == 404


def _get(port: int, path: str) -> Awaitable[tuple[int, str]]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return asyncio.to_thread(get)


async def test_debugging_services_are_off_unless_they_are_asked_for(service: Process) -> None:
    await service.start("plain")
    await service.status(SERVING)
    for method in (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await service.channel.unary_unary(method)(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_that_keeps_an_idle_connection_alive_is_not_cut_off(service: Process) -> None:
    """Servers answer pings that come too often with GOAWAY after the third. This one pings every 6 s, for 27 s."""
    await service.start("plain")
    options = [
        ("grpc.keepalive_time_ms", 6_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(service.address, options=options) as channel:
        await channel.channel_ready()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 27)
        assert channel.get_state() == grpc.ChannelConnectivity.READY
