"""The router's composition root: `python -m meshlm.router.main`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from meshlm.chassis import server
from meshlm.chassis.config import ServerConfig, Source, StateConfig, masked
from meshlm.chassis.life import Life
from meshlm.chassis.state import connect
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.answers import Answers
from meshlm.router.config import RouterConfig
from meshlm.router.guarding.guards import Guards
from meshlm.router.identity import KeyRing
from meshlm.router.pipeline import Pipeline
from meshlm.router.replicas.ejections import Ejections, voter_of
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.proof import Prover
from meshlm.router.replicas.quarantine import Quarantine
from meshlm.router.risk.vigilance import Vigilance
from meshlm.router.service import InferenceServicer
from meshlm.router.streams.returning import Returns
from meshlm.v1 import inference_pb2_grpc

log = structlog.get_logger()


class RouterService:
    name = "router"
    background_methods: frozenset[str] = frozenset()

    def __init__(self, config: RouterConfig, state: StateConfig) -> None:
        self._config = config
        self._redis = connect(state) if state.redis_url else None
        self._fleet = Fleet(config.workers, config.replicas, config.overload)
        self._answers = Answers(config)
        self._guards = Guards(config)
        ledger = Ledger(self._redis, config)
        self._quarantine = Quarantine(self._redis, self._fleet, config.proof.quarantine_seconds)
        self._ejections = Ejections(self._redis, self._fleet, config.replicas, voter_of(config.server))
        self._prover = Prover(config.proof, self._fleet, self._quarantine)
        self._pipeline = Pipeline(
            config,
            ledger=ledger,
            fleet=self._fleet,
            answers=self._answers,
            guards=self._guards,
            vigilance=Vigilance(config, self._redis, self._fleet),
            returns=Returns(self._redis, config.streams),
            prover=self._prover,
        )

    def register(self, grpc_server: grpc.aio.Server) -> Sequence[str]:
        servicer = InferenceServicer(self._config, KeyRing(self._config.callers), self._fleet, self._pipeline)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, grpc_server)
        return ["meshlm.v1.InferenceService"]

    async def start(self, life: Life) -> None:
        """Ready once its workers are, or they had their time: replicas come and go, and a request that finds
        none gets that as its reason."""
        self._fleet.start()
        self._quarantine.start()
        self._ejections.start()
        if self._redis is None and any(limits.limited for limits in self._config.all_limits()):
            log.warning("state.redis_url is empty: keys get the emergency share of their limits, from each router")
        await self._fleet.introduced()

    async def drain(self) -> None:
        """Nothing to do: calls in flight end by themselves, and new ones are refused already."""

    async def stop(self) -> None:
        await self._pipeline.stop()
        await self._prover.stop()
        await self._quarantine.stop()
        await self._ejections.stop()
        await self._fleet.stop()
        await self._answers.stop()
        await self._guards.stop()
        if self._redis is not None:
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                await self._redis.aclose()


def build(source: Source) -> tuple[RouterService, ServerConfig, Callable[[], dict[str, Any]]]:
    config = source.section("router", RouterConfig)
    state = source.section("state", StateConfig)
    return RouterService(config, state), config.server, lambda: {"router": masked(config), "state": masked(state)}


if __name__ == "__main__":
    server.main("router", build)
