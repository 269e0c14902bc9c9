"""One life of an engine process, seen from the front: start, talk, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from meshlm.worker.engine.process import ProcessSettings
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.messages import FromEngine, ToEngine


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine to start."""

    kind: Literal["model", "fake"]
    runner: dict[str, Any]  # RunnerSettings or FakeSettings
    scheduler: SchedulerSettings = SchedulerSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"


class EngineProcess:
    """A process and two sockets in a private folder. Call `start` first and `close` last."""

    def __init__(self, settings: EngineSettings) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="meshlm-"))
        self._settings = ProcessSettings(
            inbox=f"ipc://{self._folder}/in",
            outbox=f"ipc://{self._folder}/out",
            parent=os.getpid(),
            kind=settings.kind,
            runner=settings.runner,
            scheduler=settings.scheduler,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        self._context = zmq.Context()
        self._send = self._context.socket(zmq.PUSH)
        self._receive = self._context.socket(zmq.PULL)
        # Read by a callback of the event loop: zmq.asyncio takes twice the time for a message, which is a step's.
        self._received: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        self._send.set_hwm(0)
        self._receive.set_hwm(0)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder[FromEngine](FromEngine).decode
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 before `start`."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        self._send.bind(self._settings.inbox)
        self._receive.bind(self._settings.outbox)
        asyncio.get_running_loop().add_reader(self._receive.FD, self._read_all)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "meshlm.worker.engine.process",
            msgspec.json.encode(self._settings).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            env=_barrier_policy(os.environ) | os.environ,
        )

    def send(self, message: ToEngine) -> None:
        """Never waits. To a dead engine it sends nothing: its death is told by `wait`."""
        with contextlib.suppress(zmq.Again):
            self._send.send(self._encode(message), zmq.NOBLOCK)

    async def receive(self) -> FromEngine:
        while not self._received:
            self._arrived.clear()
            await self._arrived.wait()
        message: FromEngine = self._decode(self._received.popleft())
        return message

    def _read_all(self) -> None:
        """The descriptor tells once that something changed: only after zmq said that nothing is left does it again."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._received.append(self._receive.recv(zmq.NOBLOCK))
        self._arrived.set()

    async def wait(self) -> int:
        """The exit code; negative for a signal's number."""
        return await self._process.wait() if self._process is not None else 0

    async def close(self) -> None:
        """Kills what still runs and removes the sockets."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if not self._receive.closed:
            asyncio.get_running_loop().remove_reader(self._receive.FD)
        self._send.close(linger=0)
        self._receive.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)


def _barrier_policy(environ: Mapping[str, str]) -> dict[str, str]:
    """How OpenMP's threads wait for each other, unless the operator says: spin for some 50 us, then sleep.

    Spinning for ever, a step takes a hundred times longer where others need the cores too; sleeping at once costs 15%
    where nobody does.
    """
    if "OMP_WAIT_POLICY" in environ or "GOMP_SPINCOUNT" in environ:
        return {}
    return {"GOMP_SPINCOUNT": "5000"}
