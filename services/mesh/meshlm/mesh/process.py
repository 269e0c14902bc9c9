"""One process of the mesh: started, watched until it is ready, started again when it dies, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshlm.mesh.health import SERVING, grpc_health, valkey_health
from meshlm.mesh.plan import ProcessPlan

_TETHER = str(Path(__file__).with_name("tether.py"))
_DEATHS = 5
_DEATHS_SECONDS = 60.0
_FIRST_DELAY = 0.2
_LONGEST_DELAY = 5.0
_PROBE_SECONDS = 0.1
_CONFIGURATION_CODE = 2  # chassis.server.main: it would fail the same way again


@dataclass(frozen=True)
class Started:
    """A process runs; it is not ready yet."""

    name: str
    pid: int


@dataclass(frozen=True)
class Ready:
    """It serves."""

    name: str
    seconds: float  # since its start


@dataclass(frozen=True)
class Died:
    """It ended without being told to, and will be started again."""

    name: str
    why: str
    delay: float  # seconds until then


@dataclass(frozen=True)
class Stopped:
    """It ended because it was told to."""

    name: str
    why: str
    clean: bool


ProcessEvent = Started | Ready | Died | Stopped


class GaveUp(Exception):  # noqa: N818  # it is what the launcher does
    """A process cannot be kept alive; the text says which, why, and its last log lines."""

    def __init__(self, name: str, why: str, log: Path) -> None:
        super().__init__(f"{name} {why}; the end of {log}:\n{last_lines(log)}")
        self.name = name


class Child:
    """Keeps one planned process alive until it is stopped."""

    def __init__(
        self, plan: ProcessPlan, log: Path, environ: Mapping[str, str], tell: Callable[[ProcessEvent], None]
    ) -> None:
        """`environ` is what the plan's own environment is laid over."""
        self.plan = plan
        self._environ = environ
        self.log = log
        self.ready = asyncio.Event()
        self.pid = 0  # of the last start
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._renewing = False
        self._deaths: deque[float] = deque(maxlen=_DEATHS)

    def start(self) -> asyncio.Task[None]:
        """Start it. The task ends when the process was stopped, or with GaveUp."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.plan.name}")
        return self._keeper

    async def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL after that time."""
        self._stopping = True
        if self._keeper is None:
            return
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), seconds)
            self.kill()
            code = await process.wait()
            self._tell(Stopped(self.plan.name, _why(code), code == 0))
        self._keeper.cancel()  # it may wait for the next start
        with contextlib.suppress(asyncio.CancelledError, GaveUp):
            await self._keeper
        self.kill()  # a start may have been under way

    async def renew(self, seconds: float) -> None:
        """End the process and start it anew: SIGTERM, and SIGKILL after that time. Returns when it serves."""
        process = self._process
        if process is None or process.returncode is not None:  # it is being started anyway
            await self.ready.wait()
            return
        self._renewing = True
        self.ready.clear()
        process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
        self._kill_group(process.pid)
        await self.ready.wait()

    def kill(self) -> None:
        """Kill the process and what it started, now."""
        self._stopping = True
        if self._process is not None:
            self._kill_group(self._process.pid)

    async def _keep(self) -> None:
        while True:
            process = await self._spawn()
            probing = asyncio.create_task(self._probe(process.pid))
            try:
                code = await process.wait()
            finally:
                probing.cancel()
            self.ready.clear()
            if self._stopping:
                return
            self._kill_group(process.pid)  # an engine must not outlive its worker
            if self._renewing:
                self._renewing = False
                self._tell(Stopped(self.plan.name, _why(code), code == 0))
                continue
            delay = self._after_death(code)
            self._tell(Died(self.plan.name, _why(code), delay))
            await asyncio.sleep(delay)

    async def _spawn(self) -> asyncio.subprocess.Process:
        command = (sys.executable, "-I", "-S", _TETHER, str(os.getpid()), *self.plan.command)
        with self.log.open("ab") as log:
            # A session of its own: the terminal's Ctrl-C is for the launcher, which stops the rest in order.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environ, **self.plan.environment},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._tell(Started(self.plan.name, self.pid))
        return self._process

    async def _probe(self, pid: int) -> None:
        begun = time.monotonic()
        ask = valkey_health if self.plan.part == "valkey" else grpc_health
        while await ask(self.plan.address) != SERVING:  # noqa: ASYNC110  # what is waited for is in another process
            await asyncio.sleep(_PROBE_SECONDS)
        if pid == self.pid:
            self.ready.set()
            self._tell(Ready(self.plan.name, time.monotonic() - begun))

    def _after_death(self, code: int) -> float:
        """Seconds until the next start. Raises GaveUp where there is to be none."""
        if code == _CONFIGURATION_CODE:
            raise GaveUp(self.plan.name, "cannot use its configuration", self.log)
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == _DEATHS and now - self._deaths[0] < _DEATHS_SECONDS:
            raise GaveUp(self.plan.name, f"died {_DEATHS} times in a minute, at last: {_why(code)}", self.log)
        recent = sum(now - death < _DEATHS_SECONDS for death in self._deaths)
        return min(_FIRST_DELAY * 2.0 ** (recent - 1), _LONGEST_DELAY)

    @staticmethod
    def _kill_group(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def last_lines(log: Path, count: int = 10) -> str:
    """The end of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:]) or "  (it is empty)"


def _why(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
