"""A service for test_server.py, run as a process of its own: counts up slowly, and dies as it is told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from meshlm.chassis import server
from meshlm.chassis.config import ServerConfig, Source
from meshlm.chassis.life import Life
from meshlm.v1 import generation_pb2, inference_pb2, inference_pb2_grpc


class Counter(inference_pb2_grpc.InferenceServiceServicer):
    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Counts to `resume_from`; a request with an id goes no further than to the half before its file is there."""
        for number in range(request.resume_from):
            while request.resume_of and 2 * number >= request.resume_from and not _is_there(request.resume_of):
                await asyncio.sleep(0.01)
            yield inference_pb2.StreamGenerateResponse(usage=generation_pb2.Usage(completion_tokens=number))
            await asyncio.sleep(0.01)


def _is_there(file: str) -> bool:
    return Path(file).exists()


class CounterService:
    name = "counter"
    background_methods: frozenset[str] = frozenset()

    def register(self, grpc_server: grpc.aio.Server) -> Sequence[str]:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Counter(), grpc_server)
        return ["meshlm.v1.InferenceService"]

    async def start(self, life: Life) -> None:
        mode = sys.argv[1]
        if mode == "slow":
            await asyncio.sleep(600)
        if mode == "broken":
            raise RuntimeError("the secret reason")

    async def drain(self) -> None:
        sys.stdout.write("drain\n")

    async def stop(self) -> None:
        sys.stdout.write("stop\n")
        sys.stdout.flush()


def build(source: Source) -> tuple[CounterService, ServerConfig, Callable[[], dict[str, Any]]]:
    return CounterService(), source.section("router", ServerConfig), dict


if __name__ == "__main__":
    server.main("counter", build)
