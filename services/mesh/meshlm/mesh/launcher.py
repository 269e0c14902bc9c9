"""The mesh on one machine, as a context manager: `meshlm up`, the demo and the tests stand on it.

async with LocalMesh(plan, folder, config) as mesh:
    async with AsyncMesh(mesh.target, key=mesh.key) as client:
        ...
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from meshlm.chassis.config import Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.client import AsyncMesh
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.plan import MeshPlan, Planner
from meshlm.mesh.process import Child, GaveUp, ProcessEvent, Ready, Started
from meshlm.mesh.state import RunningMesh, RunningService, StateFolder

_ASK_AGAIN_SECONDS = 0.05
# Those who call end before those they call, so that every stream can settle.
_STOP_ORDER = ("router", "worker", "guard", "cache", "valkey")


class NotReady(Exception):  # noqa: N818  # a state, as GaveUp
    """The mesh did not become ready in its time; the text says what it waited for."""


class LocalMesh:
    """Starts the planned processes, keeps them alive, and stops them in order."""

    def __init__(
        self,
        plan: MeshPlan,
        folder: StateFolder,
        config: MeshConfig,
        *,
        tell: Callable[[ProcessEvent], None] = lambda event: None,
    ) -> None:
        """The folder must be acquired; `tell` hears of every start, death and end."""
        self.plan = plan
        self.target = plan.router
        self.key = plan.key
        self._folder = folder
        self._config = config
        self._listener = tell
        self._up = False
        self._children = [Child(process, folder.log(process.name), self._tell) for process in plan.processes]
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return when every service serves. Raises GaveUp or NotReady; what was started is then stopped."""
        try:
            async with asyncio.timeout(self._config.ready_seconds):
                for stage in self.plan.stages:
                    await self._start_stage({process.name for process in stage})
                await self._workers_known()
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
            children = [child for child in self._children if child.plan.part == part]
            await asyncio.gather(*(child.stop(self._config.stop_seconds) for child in children))

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

    async def _start_stage(self, names: set[str]) -> None:
        children = [child for child in self._children if child.plan.name in names]
        for child in children:
            self._folder.begin_log(child.plan.name)
            self._keepers.append(child.start())
        ready = asyncio.create_task(_all_ready(children))
        failure = asyncio.create_task(_first_failure(self._keepers))
        try:
            await asyncio.wait({ready, failure}, return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                failure.result()
        finally:
            ready.cancel()
            failure.cancel()

    async def _workers_known(self) -> None:
        """Until the router has heard of every worker, so that the first request finds them all."""
        workers = sum(process.part == "worker" for process in self.plan.processes)
        if not self.key:
            return
        async with AsyncMesh(self.target, key=self.key) as client:
            while await _ready_replicas(client) < workers:  # noqa: ASYNC110  # they are in another process
                await asyncio.sleep(_ASK_AGAIN_SECONDS)

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


async def _ready_replicas(client: AsyncMesh) -> int:
    try:
        return sum(model.ready_replicas for model in await client.list_models(deadline=10.0))
    except MeshError as error:
        if error.reason is Reason.NO_REPLICA:  # the router is not there: it may just have died
            return 0
        raise


async def _all_ready(children: list[Child]) -> None:
    await asyncio.gather(*(child.ready.wait() for child in children))


async def _first_failure(keepers: list[asyncio.Task[None]]) -> None:
    done, _ = await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
    for keeper in done:
        if not keeper.cancelled():
            keeper.result()


def plan_mesh(source: Source, folder: StateFolder, config: MeshConfig, *, config_path: Path | None = None) -> MeshPlan:
    """The plan for a configuration, with the folder's key. Raises ConfigError and StateFolderError."""
    planner = Planner(source, config, folder, config_path=config_path)
    return planner.plan(folder.key() if planner.needs_key else "")


__all__ = ["GaveUp", "LocalMesh", "NotReady", "plan_mesh"]
