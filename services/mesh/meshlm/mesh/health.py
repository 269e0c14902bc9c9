"""How a service says that it serves: grpc.health for ours, PING for Valkey."""

from __future__ import annotations

import contextlib

import grpc
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshlm.chassis.channels import open_channel

SERVING = "SERVING"
# Metadata of a caller that decided against tracing: our own questions would fill the store of recent traces.
UNSAMPLED = ("traceparent", f"00-{'1' * 32}-{'1' * 16}-00")


async def grpc_health(target: str, seconds: float = 1.0) -> str:
    """`SERVING`, `NOT_SERVING`, or the status with which the question failed, such as `UNAVAILABLE`."""
    async with open_channel(target) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def valkey_health(url: str, seconds: float = 1.0) -> str:
    """`SERVING` or `UNAVAILABLE`."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=seconds)
    try:
        with contextlib.suppress(redis.RedisError, OSError):
            return SERVING if await client.ping() else "NOT_SERVING"
        return "UNAVAILABLE"
    finally:
        await client.aclose()
