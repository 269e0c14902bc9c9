"""The mesh on one machine, as a context manager: `meshlm up`, the demo and the tests stand on it.

async with LocalMesh(plan, folder, config) as mesh:
    async with AsyncMesh(mesh.target, key=mesh.key) as client:
        ...
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from meshlm.chassis.config import PATH_VARIABLE, PREFIX, Source
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.plan import MeshPlan, Planner, ProcessPlan, variable
from meshlm.mesh.process import Child, GaveUp, ProcessEvent, Ready, Started
from meshlm.mesh.state import RunningMesh, RunningService, StateFolder

# Those who call end before those they call, so that every stream can settle.
_STOP_ORDER = ("router", "worker", "guard", "cache", "valkey")


class NotReady(Exception):  # noqa: N818  # a state, as GaveUp
    """The mesh did not become ready in its time; the text says what it waited for."""


class AddressTaken(Exception):  # noqa: N818  # a state, as GaveUp
    """A service's address is in use; the text names both."""


class LocalMesh:
    """Starts the planned processes, keeps them alive, and stops them in order."""

    def __init__(
        self,
        plan: MeshPlan,
        folder: StateFolder,
        config: MeshConfig,
        *,
        environ: Mapping[str, str] | None = None,
        tell: Callable[[ProcessEvent], None] = lambda event: None,
    ) -> None:
        """The folder must be acquired. `environ` (default: ours) goes to every process; `tell` hears what happens."""
        self.plan = plan
        self.target = plan.router
        self.key = plan.key
        self._folder = folder
        self._config = config
        self._listener = tell
        self._up = False
        environ = os.environ if environ is None else environ
        self._children = [Child(made, folder.log(made.name), environ, self._tell) for made in plan.processes]
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when every service serves.

        Raises AddressTaken, GaveUp or NotReady; what was started is then stopped.
        """
        for process in self.plan.processes:
            _claim(process)
        for child in self._children_of("router")[:1]:
            if child.plan.address != self.target:  # several share it
                _claim(replace(child.plan, address=self.target, admin=""))
        try:
            async with asyncio.timeout(self._config.ready_seconds):
                await self._start_stages()
        except TimeoutError:
            late = ", ".join(child.plan.name for child in self._children if not child.ready.is_set())
            await self.stop()
            raise NotReady(f"not ready after {self._config.ready_seconds:g} s: {late}") from None
        except BaseException:
            await self.stop()
            raise
        self._up = True
        self._leave_word()

    async def wait(self) -> None:
        """Until a process cannot be kept alive (raises GaveUp), or the mesh is stopped."""
        if self._keepers:
            await _first_failure(self._keepers)

    async def stop(self) -> None:
        """Drain: router first, then what it calls, Valkey last."""
        self._up = False
        for part in _STOP_ORDER:
            await asyncio.gather(*(child.stop(self._config.stop_seconds) for child in self._children_of(part)))

    async def roll_routers(self) -> None:
        """Start the router processes anew, one after the other: where there are several, somebody always serves."""
        for child in self._children_of("router"):
            await child.renew(self._config.stop_seconds)

    def kill(self) -> None:
        """Kill everything now."""
        for child in self._children:
            child.kill()

    def pid(self, name: str) -> int:
        """Process id of a service's last start."""
        return self._child(name).pid

    def address(self, name: str) -> str:
        """A service's gRPC target; for Valkey its URL."""
        return self._child(name).plan.address

    async def wait_ready(self, name: str) -> None:
        """Until a service serves (again)."""
        await self._child(name).ready.wait()

    def running(self) -> RunningMesh:
        """What other commands may know of this mesh."""
        services = tuple(
            RunningService(child.plan.name, child.plan.part, child.plan.address, child.plan.admin, child.pid)
            for child in self._children
        )
        return RunningMesh(os.getpid(), self.target, services, str(self._folder.key_file) if self.key else "")

    async def _start_stages(self) -> None:
        for stage in self.plan.stages:
            children = [self._child(process.name) for process in stage]
            for child in children:
                self._folder.begin_log(child.plan.name)
                self._keepers.append(child.start())
            await self._unless_one_fails(_all_ready(children))

    async def _unless_one_fails(self, work: Coroutine[Any, Any, None]) -> None:
        working = asyncio.create_task(work)
        failing = asyncio.create_task(_first_failure(self._keepers))
        try:
            await asyncio.wait({working, failing}, return_when=asyncio.FIRST_COMPLETED)
            (failing if failing.done() else working).result()
        finally:
            working.cancel()
            failing.cancel()

    def _children_of(self, part: str) -> list[Child]:
        return [child for child in self._children if child.plan.part == part]

    def _child(self, name: str) -> Child:
        return next(child for child in self._children if child.plan.name == name)

    def _tell(self, event: ProcessEvent) -> None:
        if self._up and isinstance(event, Started | Ready):
            self._leave_word()  # its pid is another now
        self._listener(event)

    def _leave_word(self) -> None:
        self._folder.tell_running(self.running())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        await self.stop()


async def _all_ready(children: list[Child]) -> None:
    await asyncio.gather(*(child.ready.wait() for child in children))


def _claim(process: ProcessPlan) -> None:
    """Asked before anything starts, for the health of whoever sits there would pass as our service's."""
    for address, key in ((process.address, "listen"), (process.admin, "admin_listen")):
        host, _, port = address.rpartition(":")
        if not port.isdecimal() or port == "0":
            continue
        family = socket.AF_INET6 if "[" in host else socket.AF_INET
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host.strip("[]"), int(port)))
            except OSError as error:
                raise AddressTaken(
                    f"{process.name} cannot have {address} ({error.strerror}); "
                    f"choose another with {process.part}.server.{key}"
                ) from None


async def _first_failure(keepers: list[asyncio.Task[None]]) -> None:
    done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
    for keeper in done:
        if not keeper.cancelled():
            keeper.result()


def plan_mesh(source: Source, folder: StateFolder, config: MeshConfig, *, config_path: Path | None = None) -> MeshPlan:
    """The plan for a configuration, with the folder's key. Raises ConfigError and StateFolderError."""
    planner = Planner(source, config, folder, config_path=config_path)
    return planner.plan(folder.key() if planner.needs_key else "")


@contextmanager
def isolated_mesh(
    root: Path, overrides: Mapping[str, str], *, tell: Callable[[ProcessEvent], None] = lambda event: None
) -> Iterator[LocalMesh]:
    """A mesh, not yet started, that knows nothing of this machine's configuration: for the demo and for tests.

    `overrides` are MESHLM__ variables. Its router listens in `root`, so that any number of them can run.
    """
    folder = StateFolder(root)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX) and k != PATH_VARIABLE}
    folder.acquire()
    try:
        listen = {variable("router", "server", "listen"): f"unix:{folder.socket('router')}"}
        environ = {**inherited, **listen, **overrides}
        source = Source.read(None, environ)
        config = source.section("mesh", MeshConfig)
        plan = Planner(source, config, folder, environ=environ).plan(folder.key())
        yield LocalMesh(plan, folder, config, environ=environ, tell=tell)
    finally:
        folder.release()


__all__ = ["AddressTaken", "GaveUp", "LocalMesh", "NotReady", "isolated_mesh", "plan_mesh"]
