"""Policies taken anew from the configuration file while the guard serves."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import structlog

from meshlm.chassis import telemetry
from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.telemetry import Name
from meshlm.guard.config import GuardConfig
from meshlm.guard.policy import Policies
from meshlm.guard.scores import read_config

log = structlog.get_logger()


class Reloading:
    """Watches the file. One that cannot be used changes nothing: the policies that were in force stay."""

    def __init__(
        self, path: Path, config: GuardConfig, policies: Policies, read: Callable[[Path], Source] = Source.read
    ) -> None:
        """`config`: what is in force, as it was read."""
        self._path = path
        self._config = config
        self._policies = policies
        self._read = read
        self._seen = self._stamp()
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reloads = telemetry.meter().create_counter(
            Name.GUARD_RELOADS, "1", "Times the policies were read anew, by outcome"
        )

    def start(self) -> None:
        """Watch until `stop`; a SIGHUP asks at once."""
        self._task = asyncio.create_task(self._watch())
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)

    async def stop(self) -> None:
        if self._task is not None:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def reload(self) -> bool:
        """Take the file's policies, all or none. Whether they are in force."""
        try:
            config = read_config(self._read(self._path))
            policies = self._policies.prepare(config.policies)
        except (ConfigError, OSError) as error:
            self._reloads.add(1, {Name.GUARD_OUTCOME: "refused"})
            log.error("policies not reloaded: the old ones stay", error=str(error))
            return False
        self._policies.replace(policies)
        self._reloads.add(1, {Name.GUARD_OUTCOME: "taken"})
        log.info("policies reloaded", versions={name: policy.version for name, policy in policies.items()})
        return True

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.reload_seconds or None):
                    await self._asked.wait()
            stamp = self._stamp()
            if self._asked.is_set() or stamp != self._seen:
                self._asked.clear()
                self._seen = stamp
                self.reload()

    def _stamp(self) -> tuple[int, int, int] | None:
        """Differs where the file does; None while there is none."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
