"""Whether a process may be sent work: warm, able, and not draining. Told to balancers as grpc.health.v1."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio


class Life:
    """What a service may say about its own health, once it runs."""

    def __init__(self) -> None:
        self._health = health_aio.HealthServicer()
        self._names: Sequence[str] = ()
        self._warm = False
        self._able = True
        self.draining = False
        self.why = "starting"

    @property
    def servicer(self) -> health_aio.HealthServicer:
        return self._health

    @property
    def serving(self) -> bool:
        return self._warm and self._able and not self.draining

    async def announce(self, names: Sequence[str]) -> None:
        self._names = ("", *names)
        await self._publish()

    async def set_able(self, able: bool, why: str = "") -> None:
        """For a running service: whether it can do its work now (an engine may be lost and come back)."""
        self._able, self.why = able, why
        await self._publish()

    async def set_warm(self) -> None:
        self._warm, self.why = True, ""
        await self._publish()

    async def set_draining(self) -> None:
        self.draining, self.why = True, "draining"
        await self._publish()

    async def _publish(self) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if self.serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)
