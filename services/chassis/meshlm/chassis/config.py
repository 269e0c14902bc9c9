"""Typed configuration: one TOML file, a frozen dataclass a section, environment overrides.

`MESHLM__WORKER__SERVER__LISTEN=...` overrides `worker.server.listen`. Strings are taken as they are, everything else
is read as a TOML value. Unknown keys and wrong types are errors that name the full path; nothing is coerced silently
(an integer is accepted where a float is wanted).
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

PREFIX = "MESHLM__"
PATH_VARIABLE = "MESHLM_CONFIG"
SECTIONS = frozenset({"router", "worker", "guard", "cache", "mesh", "telemetry", "state"})

T = TypeVar("T")


class ConfigError(Exception):
    """A configuration that cannot be used; the text names the full path of the key."""


@dataclass(frozen=True)
class Source:
    """Everything that was said about the configuration, before types: the file's tree with overrides laid over it."""

    tree: Mapping[str, Any]
    origins: Mapping[str, str]  # dotted path to "file" or the variable's name
    path: Path | None = None  # of the file

    @classmethod
    def read(cls, path: Path | None = None, environ: Mapping[str, str] | None = None) -> Source:
        """Read the file (argument, else $MESHLM_CONFIG, else none) and the environment.

        Raises ConfigError for a file that is missing or is no TOML, and for unknown sections.
        """
        environ = os.environ if environ is None else environ
        if path is None and (named := environ.get(PATH_VARIABLE)):
            path = Path(named)
        tree = _read_file(path) if path is not None else {}
        origins = dict.fromkeys(_leaves(tree), "file")
        for variable in sorted(environ):
            if variable.startswith(PREFIX):
                keys = variable[len(PREFIX) :].lower().split("__")
                _plant(tree, keys, _Override(environ[variable], variable), variable)
                origins[".".join(keys)] = variable
        for section in tree:
            if section not in SECTIONS:
                raise ConfigError(f"{section}: unknown section; known are {', '.join(sorted(SECTIONS))}")
        return cls(tree, origins, path)

    def section(self, name: str, kind: type[T]) -> T:
        """The section as its dataclass. Raises ConfigError naming the key at fault."""
        built = _build(kind, self.tree.get(name, {}), name)
        return typing.cast(T, built)

    def origin(self, dotted: str) -> str:
        """Where a value came from: the variable's name, `file` or `default`."""
        return self.origins.get(dotted, "default")


@dataclass(frozen=True)
class _Override:
    """A value from the environment: its type is known only when the field is."""

    text: str
    variable: str


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        found += _leaves(value, f"{dotted}.") if isinstance(value, dict) else [dotted]
    return found


def _plant(tree: dict[str, Any], keys: list[str], value: _Override, variable: str) -> None:
    if len(keys) < 2 or not all(keys):
        raise ConfigError(f"{variable}: expected {PREFIX}SECTION__KEY")
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{variable}: {key} is no table")
    tree[keys[-1]] = value


def _build(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, _Override):
        value = _from_text(kind, value, path)
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, path)
    if origin in (Union, types.UnionType):
        return _build_optional(kind, value, path)
    if origin is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{path}: expected one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected a list, got {_name(value)}")
        return tuple(_build(get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping, typing.get_origin(Mapping[str, Any])):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a table, got {_name(value)}")
        return {key: _build(get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    return _build_scalar(kind, value, path)


def _build_dataclass(kind: type, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a table, got {_name(value)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown key; known are {', '.join(sorted(fields))}")
    known = {key: _build(hints[key], item, f"{path}.{key}") for key, item in value.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in known:
            raise ConfigError(f"{path}.{name}: required")
    try:
        return kind(**known)
    except ValueError as error:  # from __post_init__: a range or a contradiction
        raise ConfigError(f"{path}: {error}") from None


def _build_optional(kind: Any, value: Any, path: str) -> Any:
    choices = [k for k in get_args(kind) if k is not types.NoneType]
    if value is None or len(choices) != 1:
        raise ConfigError(f"{path}: unsupported value {value!r}")
    return _build(choices[0], value, path)


def _build_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            names = ", ".join(repr(member.value) for member in kind)
            raise ConfigError(f"{path}: expected one of {names}, got {value!r}") from None
    if type(value) is not kind:
        raise ConfigError(f"{path}: expected {kind.__name__}, got {_name(value)}")
    return value


def _from_text(kind: Any, override: _Override, path: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not types.NoneType)
    textual = get_origin(kind) is Literal and all(isinstance(item, str) for item in get_args(kind))
    if kind in (str, Path) or textual or (isinstance(kind, type) and issubclass(kind, Enum)):
        return override.text
    try:
        return tomllib.loads(f"value = {override.text}")["value"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"{path}: {override.variable}={override.text!r} is no TOML value") from None


def _name(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


@dataclass(frozen=True)
class ServerConfig:
    """How a service listens (`<service>.server`)."""

    # Address of the gRPC server: host:port, or unix:PATH.
    listen: str
    # Another address on which the same is served, e.g. one that is this process's alone; empty: none.
    also_listen: str = ""
    # Whether other processes may listen on the same host:port, each getting a share of the connections (SO_REUSEPORT).
    # A process that drains then leaves the port at once, so that new connections go to the others.
    reuse_port: bool = False
    # Address of the admin port (HTTP: /metrics, /livez, /readyz, /config); empty: none.
    admin_listen: str = ""
    # Seconds that running calls may take to end after SIGTERM.
    grace_seconds: float = 30.0
    # Largest message accepted, bytes.
    max_receive_bytes: int = 4 * 1024 * 1024
    # Most calls at a time on one connection.
    max_concurrent_streams: int = 1024
    # Serve grpc.reflection (names of services and messages): off in production.
    reflection: bool = False
    # Serve grpc.channelz (live transport state): off in production.
    channelz: bool = False


@dataclass(frozen=True)
class TelemetryConfig:
    """Traces, metrics and logs (`telemetry`)."""

    # OTLP/gRPC endpoint for traces and metrics, e.g. http://collector:4317; empty: none.
    otlp_endpoint: str = ""
    # File that keeps recent spans for `meshlm trace`; empty: none. The launcher sets it.
    span_store: str = ""
    # Traces kept in it.
    span_store_traces: int = 1000
    # Share of traces recorded where the caller did not decide; none where they are neither exported nor kept.
    # Range [0, 1].
    sample_ratio: float = 1.0
    # Least level written.
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # `json` for machines, `console` for people.
    log_format: Literal["json", "console"] = "json"
    # Name of the deployment in resource attributes.
    environment: str = "local"

    def __post_init__(self) -> None:
        if not 0 <= self.sample_ratio <= 1:
            raise ValueError("sample_ratio must be in [0, 1]")


@dataclass(frozen=True)
class StateConfig:
    """The shared Redis or Valkey (`state`)."""

    # redis://host:port/db, rediss://..., or unix://PATH. The launcher starts a private server where this is empty.
    redis_url: str = ""
    # Whether it is a cluster; `redis_url` names any of its nodes, then.
    cluster: bool = False
    # Seconds a command may take before its caller goes on without.
    timeout_seconds: float = 0.5

    def __post_init__(self) -> None:
        if self.cluster and not self.redis_url.startswith(("redis://", "rediss://")):
            raise ValueError("cluster needs redis_url to be redis://... or rediss://...")


def masked(value: Any, name: str = "") -> Any:
    """A dataclass as plain data for display, secrets hidden."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: masked(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [masked(item, name) for item in value]
    if isinstance(value, str) and value and any(word in name for word in ("hash", "secret", "password", "pepper")):
        return "***"
    if isinstance(value, str) and "://" in value and ("@" in value or "?" in value):
        scheme, rest = value.split("://", 1)
        before, query, _ = rest.partition("?")  # which may name a password as well, or stand in one
        _, user, place = before.rpartition("@")
        return f"{scheme}://{'***@' if '@' in rest else ''}{place if user or '@' not in rest else ''}{query and '?***'}"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


__all__ = ["ConfigError", "ServerConfig", "Source", "StateConfig", "TelemetryConfig", "field", "masked"]
