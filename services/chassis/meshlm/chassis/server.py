"""The life of a service's process: bind, load, warm up, SERVING; on SIGTERM or SIGINT drain in order, and exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grpc
import structlog
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from meshlm.chassis import logs
from meshlm.chassis.admin import AdminPort
from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.config import ConfigError, ServerConfig, Source, TelemetryConfig
from meshlm.chassis.life import Life
from meshlm.chassis.telemetry import Telemetry

log = structlog.get_logger()

# New objects before the youngest are searched for cycles, and passes before older ones are. Python's own 700 would
# search a message's few objects again and again: a tenth of a router's time.
_GC_THRESHOLDS = (10_000, 10, 20)


class Service(Protocol):
    """A service as the chassis sees it."""

    name: str
    # Full method names (/package.Service/Method) of streams that end only when the service does.
    background_methods: frozenset[str]

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the servicers; return the full names of the gRPC services."""
        ...

    async def start(self, life: Life) -> None:
        """Load and warm up; return when able to serve. What it raises ends the process with code 1."""
        ...

    async def drain(self) -> None:
        """SIGTERM came: new calls are already refused, running ones go on. Ends background streams' usefulness."""
        ...

    async def stop(self) -> None:
        """No call runs any more: give everything back."""
        ...


async def run(service: Service, server_config: ServerConfig, describe: Callable[[], dict[str, Any]]) -> None:
    """Run a service until it is told to stop. `describe` gives the configuration in force, for the admin port."""
    gate, life = Gate(service.background_methods), Life()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = _make_server(server_config, gate)
    names = service.register(server)
    health_pb2_grpc.add_HealthServicer_to_server(life.servicer, server)
    _add_debugging(server, server_config, names)
    await life.announce(names)
    port = server.add_insecure_port(server_config.listen)
    if server_config.also_listen:
        server.add_insecure_port(server_config.also_listen)
    admin = AdminPort(server_config.admin_listen, life, describe)
    await server.start()
    admin.start()
    log.info("bound", listen=server_config.listen, port=port)
    try:
        if await _start_or_stop(service, life, stopping):
            _spare_what_stays()
            await life.set_warm()
            log.info("serving", listen=server_config.listen)
            await stopping.wait()
            await _drain(service, server_config, gate, life, server)
    finally:
        # Calls that outlived the grace time are cancelled here, and settle; only then may the engine go.
        await server.stop(0.5)
        await service.stop()
        admin.stop()
    log.info("stopped")


def _spare_what_stays() -> None:
    """What was loaded by now stays for good: a full collection, which stops every stream for as long as it takes (tens
    of milliseconds for the libraries alone), need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _start_or_stop(service: Service, life: Life, stopping: asyncio.Event) -> bool:
    """Whether the service is warm; False if it was told to stop first."""
    starting = asyncio.ensure_future(service.start(life))
    told = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    starting.result()
    return True


async def _drain(service: Service, config: ServerConfig, gate: Gate, life: Life, server: grpc.aio.Server) -> None:
    # Health first, so that balancers look elsewhere; then the gate, so that late calls get a reason.
    log.info("draining", running=gate.running, grace_seconds=config.grace_seconds)
    begun = time.monotonic()
    await life.set_draining()
    # Where others listen on the port, they get the new connections: nobody need be refused.
    leaving = asyncio.ensure_future(server.stop(config.grace_seconds)) if config.reuse_port else None
    gate.closed = True
    await service.drain()
    ended = await gate.wait_idle(config.grace_seconds)
    if leaving is not None:
        await leaving
    log.info("drained", complete=ended, left=gate.running, seconds=round(time.monotonic() - begun, 3))


def _make_server(config: ServerConfig, gate: Gate) -> grpc.aio.Server:
    options = [
        ("grpc.max_receive_message_length", config.max_receive_bytes),
        ("grpc.max_send_message_length", 64 * 1024 * 1024),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.max_metadata_size", 16 * 1024),
        # Clients ping every 30 s (channels.py); gRPC's default would call that abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", int(config.reuse_port)),
    ]
    return grpc.aio.server(interceptors=[CallInterceptor(gate)], options=options)


def _add_debugging(server: grpc.aio.Server, config: ServerConfig, names: Sequence[str]) -> None:
    if config.reflection:
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
        )
    if config.channelz:
        channelz.add_channelz_servicer(server)


def main(name: str, build: Callable[[Source], tuple[Service, ServerConfig, Callable[[], dict[str, Any]]]]) -> None:
    """The `main` of a service's process: read the configuration, build the service, run it.

    Exit code 0 after a drain, 2 for a configuration that cannot be used, 1 for everything else.
    """
    telemetry: Telemetry | None = None
    try:
        source = Source.read()
        telemetry_config = source.section("telemetry", TelemetryConfig)
        logs.configure(name, telemetry_config)
        telemetry = Telemetry(name, telemetry_config)
        asyncio.run(_build_and_run(build, source))
    except ConfigError as error:
        sys.stderr.write(f"meshlm {name}: configuration: {error}\n")
        sys.exit(2)
    except Exception:
        log.exception("the service failed")
        sys.exit(1)
    finally:
        if telemetry is not None:
            telemetry.close()


async def _build_and_run(
    build: Callable[[Source], tuple[Service, ServerConfig, Callable[[], dict[str, Any]]]], source: Source
) -> None:
    # Inside the loop: a grpc.aio channel belongs to the loop in which it was made.
    await run(*build(source))
