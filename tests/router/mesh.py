"""A router with its real parts amid peers that answer as a test says, all over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
from redis.asyncio import Redis

from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.channels import open_channel
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.answers import Answers
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.guarding.guards import Guards
from meshlm.router.identity import KeyRing
from meshlm.router.pipeline import Pipeline
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.proof import Prover
from meshlm.router.replicas.quarantine import Quarantine
from meshlm.router.risk.vigilance import Vigilance
from meshlm.router.service import InferenceServicer
from meshlm.router.streams.returning import Returns
from meshlm.v1 import (
    cache_pb2_grpc,
    guard_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2_grpc,
)
from meshlm.v1 import generation_pb2 as pb
from tests.router.names import fleet as fleet  # a fixture
from tests.router.peers import FakeCache, FakeGuard, FakeWorker

SECRET = "a-key"


def key(**more: Any) -> KeyConfig:
    return KeyConfig(id="k", secret_hash=hashlib.sha256(SECRET.encode()).hexdigest(), tenant="t", **more)


class Mesh:
    """A router with its real parts, and fake peers behind real sockets."""

    def __init__(self, folder: Path, state: Redis, config: dict[str, Any], holder: KeyConfig) -> None:
        self.workers = [FakeWorker("w0"), FakeWorker("w1")]
        self.guard, self.cache = FakeGuard(), FakeCache()
        self._servers: list[grpc.aio.Server] = []
        targets = [f"unix:{folder}/w{i}" for i in range(len(self.workers))]
        for target, worker in zip(targets, self.workers, strict=True):
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, self._server(target))
        guard_pb2_grpc.add_GuardServiceServicer_to_server(self.guard, self._server(f"unix:{folder}/g"))
        cache_pb2_grpc.add_CacheServiceServicer_to_server(self.cache, self._server(f"unix:{folder}/c"))
        peers = {"workers": tuple(targets), "guard": f"unix:{folder}/g", "cache": f"unix:{folder}/c"}
        usual = {"aliases": {"alias": "m"}, "guard_seconds": 60.0, "cache_seconds": 60.0}
        self.config = RouterConfig(keys=(holder,), **{**peers, **usual, **config})
        # How quick they are, and which of them was heard first, is the machine's matter.
        self.fleet = Fleet(targets, ReplicaConfig(eject_slowness=0.0, slow_start_seconds=0.0))
        self.guards, self.answers = Guards(self.config), Answers(self.config)
        self.guards._redacting[""] = False  # as after a first request: from then on the guard runs beside
        self.ledger = Ledger(state, self.config)
        self.vigilance = Vigilance(self.config, state, self.fleet)
        self.quarantine = Quarantine(state, self.fleet, self.config.proof.quarantine_seconds)
        self.prover = Prover(self.config.proof, self.fleet, self.quarantine)
        self.pipeline = Pipeline(
            self.config,
            ledger=self.ledger,
            fleet=self.fleet,
            answers=self.answers,
            guards=self.guards,
            vigilance=self.vigilance,
            returns=Returns(state, self.config.streams),
            prover=self.prover,
        )
        self.servicer = InferenceServicer(self.config, KeyRing(self.config.callers), self.fleet, self.pipeline)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.servicer, self._server(f"unix:{folder}/r"))
        self.channel = open_channel(f"unix:{folder}/r")
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.metadata = [("authorization", f"Bearer {SECRET}")]

    def _server(self, target: str) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[CallInterceptor(Gate())])
        server.add_insecure_port(target)
        self._servers.append(server)
        return server

    async def start(self) -> None:
        for server in self._servers:
            await server.start()
        self.fleet.start()
        self.quarantine.start()
        async with asyncio.timeout(60):
            while not all(replica.usable for replica in self.fleet.replicas):
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self.channel.close()
        for server in reversed(self._servers):
            await server.stop(0)
        await self.pipeline.stop()
        await self.prover.stop()
        await self.quarantine.stop()
        await self.fleet.stop()
        await self.guards.stop()
        await self.answers.stop()

    def rekey(self, keys: tuple[KeyConfig, ...]) -> None:
        """Other rights from now on."""
        self.servicer._keys = KeyRing(keys)

    def stream(self, text: str = "hi", *, resume_from: int = 0, timeout: float = 60, **fields: Any) -> Any:
        generation = self.generation(text, **fields)
        request = inference_pb2.StreamGenerateRequest(generation=generation, resume_from=resume_from)
        return self.stub.StreamGenerate(request, metadata=self.metadata, timeout=timeout)

    @staticmethod
    def generation(text: str = "hi", *, sampling: dict[str, Any] | None = None, **fields: Any) -> pb.Generation:
        chat = pb.Chat(messages=[pb.Message(role="user", content=text)])
        options = {"temperature": 0.0, "max_tokens": 10, **(sampling or {})}
        return pb.Generation(**{"input": pb.Input(chat=chat), "sampling": pb.Sampling(**options), **fields})
