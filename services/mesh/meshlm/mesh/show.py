"""`meshlm config`: what is in force in each section, and where each value came from."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.markup import escape

from meshlm.cache.config import CacheConfig
from meshlm.chassis.config import ConfigError, Source, StateConfig, TelemetryConfig, masked
from meshlm.guard.config import GuardConfig
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.plan import Planner
from meshlm.mesh.settings import Settings, add_config_arguments, read_settings
from meshlm.mesh.terminal import open_console, plain_table
from meshlm.router.config import RouterConfig
from meshlm.worker.config import WorkerConfig

SERVICES: dict[str, type[Any]] = {
    "router": RouterConfig,
    "worker": WorkerConfig,
    "guard": GuardConfig,
    "cache": CacheConfig,
}
SHARED: dict[str, type[Any]] = {"telemetry": TelemetryConfig, "state": StateConfig}
_LAUNCHER = "launcher"


class Value(NamedTuple):
    """A key of the configuration as it is in force."""

    service: str  # who reads it: a process of `meshlm up`, `mesh` for the launcher itself, or `all`
    key: str
    value: Any
    origin: str  # `file`, a variable's name, `default`, or `launcher` for what `meshlm up` sets by itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm config`."""
    add_config_arguments(parser)
    parser.add_argument("service", nargs="?", help="only this one's: router, worker, guard, cache or mesh")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm config`."""
    found = list(values(read_settings(arguments)))
    if arguments.service:
        found = [value for value in found if value.service == arguments.service]
    if not found:
        raise ConfigError(f"{arguments.service}: `meshlm up` would start no such service")
    table = plain_table("service", "key", "value", "from")
    for service, key, value, origin in found:
        style = "dim" if origin == "default" else ""
        table.add_row(service, key, escape(json.dumps(value, ensure_ascii=False)), origin, style=style)
    open_console().print(table)
    return 0


def values(settings: Settings) -> Iterator[Value]:
    """All that `meshlm up` would run with, secrets hidden. Raises ConfigError for what its services would refuse."""
    yield from _of("mesh", settings.source, {"mesh": MeshConfig}, frozenset())
    plan = Planner(settings.source, settings.mesh, settings.folder, config_path=settings.config_path).plan(key="")
    for process in plan.processes:
        if process.part == "valkey":
            continue
        source = Source.read(settings.config_path, {**os.environ, **process.environment})
        launcher = frozenset(process.environment)
        yield from _of(process.name, source, {process.part: SERVICES[process.part]}, launcher)
    yield from _of("all", source, SHARED, launcher)


def _of(service: str, source: Source, kinds: dict[str, type[Any]], launcher: frozenset[str]) -> Iterator[Value]:
    for section, kind in kinds.items():
        for key, value in _flat(masked(source.section(section, kind)), section):
            origin = source.origin(key)
            yield Value(service, key, value, _LAUNCHER if origin in launcher else origin)


def _flat(value: Any, dotted: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{dotted}.{key}")
    else:
        yield dotted, value
