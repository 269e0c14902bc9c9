"""The state folder of a mesh on one machine: its lock, sockets, logs, spans and key."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KEY_PREFIX = "mlm_"
# sockaddr_un holds 108 bytes with the closing zero.
_LONGEST_SOCKET = 107


class MeshNotRunningError(Exception):
    """No mesh runs on this state folder."""


class StateFolderError(Exception):
    """The folder cannot be used; the text says why."""


@dataclass(frozen=True)
class RunningService:
    """A service as the launcher last knew it."""

    name: str
    part: str  # valkey, guard, cache, worker or router
    address: str  # gRPC target; for valkey the URL
    admin: str  # host:port of the admin port, or empty
    pid: int


@dataclass(frozen=True)
class RunningMesh:
    """What other commands need to know of a running mesh."""

    pid: int
    router: str
    services: Sequence[RunningService]
    # File with the local key, or empty where the keys come from the configuration.
    key_file: str


class StateFolder:
    """The paths, and who holds the folder. Everything in it is for this user alone."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.logs = self.root / "logs"
        self.spans = self.root / "spans.db"
        self.key_file = self.root / "key"
        self._sockets = self.root / "run"
        self._lock_file = self.root / "lock"
        self._running_file = self.root / "mesh.json"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Make the folder and hold it. Raises StateFolderError where another launcher does."""
        for folder in (self.root, self.logs, self._sockets):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)  # sockets in it know no keys
        lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode().strip()
            os.close(lock)
            raise StateFolderError(
                f"a mesh already runs on {self.root} (pid {holder}); "
                "stop it, or give this one a folder of its own with --state-dir"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def release(self) -> None:
        """Let the folder go. Logs, spans and the key stay."""
        if self._lock is not None:
            self._running_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def socket(self, name: str) -> str:
        """Path of a socket. Raises StateFolderError where it is too long for the system."""
        path = str(self._sockets / f"{name}.sock")
        if len(path.encode()) > _LONGEST_SOCKET:
            raise StateFolderError(f"{path} is too long for a unix socket: choose a shorter --state-dir")
        return path

    def log(self, name: str) -> Path:
        """A service's log."""
        return self.logs / f"{name}.log"

    def begin_log(self, name: str) -> None:
        """Start a service's log anew; the last run's is kept beside it."""
        path = self.log(name)
        if path.exists():
            path.replace(path.with_suffix(".log.1"))
        path.touch(mode=0o600)

    def key(self) -> str:
        """The local key: made once, kept for this user alone. Delete the file to have a new one."""
        if self.key_file.exists():
            return self.key_file.read_text("ascii").strip()
        key = new_key()
        _write_private(self.key_file, f"{key}\n")
        return key

    def tell_running(self, mesh: RunningMesh) -> None:
        """Leave word for the other commands."""
        _write_private(self._running_file, json.dumps(asdict(mesh), indent=2))

    def running(self) -> RunningMesh:
        """The mesh that runs here. Raises MeshNotRunningError."""
        if not self._held():
            raise MeshNotRunningError(f"no mesh runs on {self.root}; start one with `meshlm up`")
        try:
            told: Mapping[str, Any] = json.loads(self._running_file.read_text("utf-8"))
        except FileNotFoundError:
            raise MeshNotRunningError(f"the mesh on {self.root} is only starting; try again in a moment") from None
        services = tuple(RunningService(**service) for service in told["services"])
        return RunningMesh(told["pid"], told["router"], services, told["key_file"])

    def _held(self) -> bool:
        try:
            lock = os.open(self._lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False


def new_key() -> str:
    """A key with 256 bits of chance."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, readable by this user alone."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    scratch.replace(path)
