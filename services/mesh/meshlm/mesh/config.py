"""Configuration of the launcher (section `mesh`)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


def default_state_dir() -> Path:
    """`meshlm` in the user's state folder."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "meshlm"


@dataclass(frozen=True)
class WorkerEntry:
    """One worker of a machine that runs several."""

    # Its name in logs, in `meshlm status`, and as a replica.
    name: str
    # What differs from section `worker`: dotted keys below it, values as text as in the environment,
    # e.g. { model_path = "...", "server.grace_seconds" = "5" }.
    overrides: dict[str, str] = field(default_factory=dict)
    # Who asks it. Empty: the guard alone, if its configuration names the worker's model and another worker is left to
    # the router; else the router, and the guard if it needs it.
    used_by: tuple[Literal["router", "guard"], ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError("name must have 1 to 31 of a-z 0-9 -")


@dataclass(frozen=True)
class MeshConfig:
    """The mesh on one machine: what `meshlm up` starts, and where it keeps what it needs."""

    # Folder for sockets, logs, spans and the local key. One mesh for each folder.
    state_dir: Path = field(default_factory=default_state_dir)
    # Seconds all services together may take to load and warm up.
    ready_seconds: float = 300.0
    # Seconds each service may take to end after SIGTERM before it is killed; above its own grace time.
    stop_seconds: float = 45.0
    # Router processes, all on `router.server.listen`.
    routers: int = 1
    # Admin ports count up from here, in the order of the table that `up` prints; 0: none but those configured.
    admin_from: int = 0
    # Workers; empty: one, as section `worker` says.
    workers: tuple[WorkerEntry, ...] = ()

    def __post_init__(self) -> None:
        names = [worker.name for worker in self.workers]
        if len(set(names)) != len(names):
            raise ValueError("two workers have the same name")
        if any(name in ("valkey", "guard", "cache") or re.fullmatch("router(-[0-9]+)?", name) for name in names):
            raise ValueError("a worker cannot have another service's name")
        if self.routers < 1:
            raise ValueError("routers must be at least 1")
        if not 0 <= self.admin_from <= 65_000:
            raise ValueError("admin_from must be in [0, 65000]")
