"""`meshlm quarantine`: workers that were proven wrong, and their release."""

from __future__ import annotations

import argparse
import asyncio

from redis.exceptions import RedisError

from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.state import connect
from meshlm.mesh.settings import Settings, add_config_arguments, read_settings
from meshlm.mesh.terminal import open_console, plain_table
from meshlm.router.replicas.quarantine import Register


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm quarantine`."""
    add_config_arguments(parser)
    parser.add_argument("--release", metavar="REPLICA", help="let this worker serve again, on all routers")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm quarantine`: 0, also where nobody is under it; 1 where the one to release is not."""
    settings, console = read_settings(arguments), open_console()
    listed = asyncio.run(_ask(_state_of(settings), ""))
    if arguments.release:
        if arguments.release not in listed:
            console.print(f"{arguments.release} is not under quarantine")
            return 1
        listed = asyncio.run(_ask(_state_of(settings), arguments.release))
    table = plain_table("replica", "seconds left", "why")
    for name, (left, why) in sorted(listed.items()):
        table.add_row(name, f"{left:.0f}", why)
    console.print(table if listed else "no worker is under quarantine")
    return 0


def _state_of(settings: Settings) -> StateConfig:
    """The store that is configured; else the one of the mesh that runs here. Raises MeshNotRunningError."""
    state = settings.source.section("state", StateConfig)
    if state.redis_url:
        return state
    running = settings.folder.running()
    url = next(service.address for service in running.services if service.part == "valkey")
    return StateConfig(redis_url=url, timeout_seconds=state.timeout_seconds)


async def _ask(state: StateConfig, release: str) -> dict[str, tuple[float, str]]:
    redis = connect(state)
    try:
        register = Register(redis)
        return await (register.release(release) if release else register.read())
    except (RedisError, OSError, TimeoutError):
        raise MeshError(Reason.NO_REPLICA, "the store does not answer") from None
    finally:
        await redis.aclose()
