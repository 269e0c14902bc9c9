"""`meshlm status` and `meshlm models`: how the mesh is, and what it serves."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meshlm.chassis.channels import open_channel
from meshlm.mesh.client import Mesh
from meshlm.mesh.health import SERVING, UNSAMPLED, grpc_health, valkey_health
from meshlm.mesh.settings import add_config_arguments, add_endpoint_arguments, find_endpoint, read_settings
from meshlm.mesh.state import RunningService
from meshlm.mesh.terminal import open_console, plain_table
from meshlm.v1 import worker_pb2, worker_pb2_grpc

_SECONDS = 2.0


@dataclass(frozen=True)
class Health:
    """A service at this moment."""

    serving: bool
    text: str
    milliseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm status`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`meshlm status`: 1 where something does not serve."""
    running = read_settings(arguments).folder.running()
    return asyncio.run(_show(list(running.services), open_console()))


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm models`."""
    add_endpoint_arguments(parser)


def run_models(arguments: argparse.Namespace) -> int:
    """`meshlm models`."""
    endpoint = find_endpoint(arguments)
    with Mesh(endpoint.target, key=endpoint.key, deadline=10.0) as mesh:
        models = mesh.list_models()
    table = plain_table("model", "revision", "context", "replicas", "adapters")
    for model in models:
        name = f"{escape(model.name)}{' (default)' if model.is_default else ''}"
        adapters = ", ".join(model.adapters) or "-"
        revision = escape(f"-> {', '.join(model.targets)}") if model.targets else model.revision[:12]
        table.add_row(name, revision, str(model.max_context), str(model.ready_replicas), escape(adapters))
    open_console().print(table)
    return 0


async def _show(services: list[RunningService], console: Console) -> int:
    healths = await asyncio.gather(*(check(service) for service in services))
    table = plain_table("service", "health", "answers in", "pid", "address")
    for service, health in zip(services, healths, strict=True):
        style = "green" if health.serving else "red"
        took = f"{health.milliseconds:.1f} ms"
        table.add_row(service.name, f"[{style}]{health.text}[/]", took, str(service.pid), escape(service.address))
    console.print(table)
    workers = [service for service in services if service.part == "worker"]
    loads = await asyncio.gather(*(load_of(worker.address) for worker in workers))
    console.print(_loads_table([load for load in loads if load is not None]))
    return 0 if all(health.serving for health in healths) else 1


async def check(service: RunningService) -> Health:
    """Ask a service for its health."""
    begun = time.perf_counter()
    text = await (valkey_health if service.part == "valkey" else grpc_health)(service.address, _SECONDS)
    return Health(text == SERVING, text, (time.perf_counter() - begun) * 1000)


async def load_of(target: str) -> worker_pb2.WatchLoadResponse | None:
    """A worker's load now; None where it does not answer."""
    async with open_channel(target) as channel:
        stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)
        request = worker_pb2.WatchLoadRequest(watcher="meshlm status")
        call = stub.WatchLoad(request, metadata=(UNSAMPLED,), timeout=_SECONDS)
        try:
            async for load in call:
                assert isinstance(load, worker_pb2.WatchLoadResponse)  # noqa: S101  # the stub is untyped
                return load
        except grpc.RpcError:
            return None
        finally:
            call.cancel()
    return None


def _loads_table(loads: list[worker_pb2.WatchLoadResponse]) -> Table:
    table = plain_table(
        "replica", "model", "running", "waiting", "blocks in use", "step", "steps", "cancelled", "engines"
    )
    for load in loads:
        used = load.total_blocks - load.free_blocks
        table.add_row(
            escape(load.replica),
            escape(load.model.name),
            str(load.running),
            f"{load.waiting}/{load.waiting_limit}",
            f"{used}/{load.total_blocks}",
            f"{load.step_seconds * 1000:.1f} ms",
            str(load.counters.steps),
            str(load.counters.cancelled),
            str(load.counters.engine_starts),
        )
    return table
