"""What would happen to a request is told as it would happen, and telling it changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.config import KeyConfig, PriceConfig, TenantConfig
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.mesh import Mesh, key


@pytest.fixture
def holder() -> KeyConfig:
    return key(requests_per_minute=4, completion_tokens_per_minute=600, priority="standard")


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {
        "prices": {"m": PriceConfig(prompt=1_000_000, completion=2_000_000)},
        "tenants": {"t": TenantConfig(concurrent_streams=2)},
    }


async def explain(mesh: Mesh, text: str = "hi", **fields: Any) -> inference_pb2.ExplainRouteResponse:
    request = inference_pb2.ExplainRouteRequest(generation=mesh.generation(text, **fields))
    told: inference_pb2.ExplainRouteResponse = await mesh.stub.ExplainRoute(request, metadata=mesh.metadata, timeout=60)
    return told


async def run(mesh: Mesh, text: str = "hi", **fields: Any) -> list[Any]:
    call, seen = mesh.stream(text, **fields), []
    while (response := await call.read()) is not grpc.aio.EOF:
        seen.append(response)
    return seen


def left(told: inference_pb2.ExplainRouteResponse) -> dict[str, int]:
    return {limit.limit: limit.left for limit in told.limits}


async def test_it_says_who_asks_and_what_is_left_and_takes_none_of_it(mesh: Mesh, state: Redis) -> None:
    for _ in range(4):
        told = await explain(mesh)
    names = {name.decode() for name in await state.keys("*") if b":reservation:" not in name}
    assert names == {"meshlm:{t}:key:k:inquiries_per_minute"}
    assert not mesh.guard.inputs
    assert not any(worker.requests for worker in mesh.workers)
    assert (told.key_id, told.tenant, told.priority) == ("k", "t", pb.PRIORITY_STANDARD)
    assert left(told) == {"requests_per_minute": 4, "completion_tokens_per_minute": 600, "concurrent_streams": 2}
    assert {limit.holder for limit in told.limits} == {"key", "tenant"}
    assert (told.ledger, told.cache, list(told.refusals)) == ("shared", "asked", [])
    assert told.most_cost_micros == told.prompt_tokens + 2 * told.completion_tokens


async def test_what_it_says_is_what_then_happens(mesh: Mesh) -> None:
    mesh.workers[0].load.running = 9
    mesh.workers[0].changed.set()
    async with asyncio.timeout(60):
        while mesh.fleet.replicas[0].state is None or mesh.fleet.replicas[0].state.running != 9:
            await asyncio.sleep(0.005)
    told = await explain(mesh)
    start = (await run(mesh))[0].start
    assert told.routing.replica == start.routing.replica == "w1"
    assert told.routing.reason == start.routing.reason == "least_loaded"
    assert [c.replica for c in told.routing.considered] == [c.replica for c in start.routing.considered] == ["w1", "w0"]
    assert start.limits.requests_remaining == told.limits[0].left - 1


async def test_a_limit_that_would_refuse_is_told_with_its_time_to_wait(mesh: Mesh) -> None:
    for number in range(4):
        await run(mesh, f"n {number}", sampling={"max_tokens": 3})
    told = await explain(mesh, "one more")
    (refusal,) = told.refusals
    assert (refusal.stage, refusal.reason, refusal.metadata["limit"]) == (
        "limits",
        "RATE_LIMITED",
        "requests_per_minute",
    )
    assert 5 < refusal.retry_after_seconds <= 15
    assert told.routing.replica  # the other stages are told all the same
    with pytest.raises(grpc.RpcError) as caught:
        await run(mesh, "one more")
    assert from_rpc_error(caught.value).metadata == dict(refusal.metadata) | {
        "wait_seconds": from_rpc_error(caught.value).metadata["wait_seconds"]
    }


async def test_a_model_that_nobody_serves_and_no_replica_are_refusals_and_no_errors(mesh: Mesh) -> None:
    (refusal,) = (await explain(mesh, model="nobody")).refusals
    assert (refusal.stage, refusal.reason) == ("model", "MODEL_UNKNOWN")
    for worker in mesh.workers:
        worker.load.draining = True
        worker.changed.set()
    async with asyncio.timeout(60):
        while any(replica.usable for replica in mesh.fleet.replicas):
            await asyncio.sleep(0.005)
    (refusal,) = (await explain(mesh)).refusals
    assert (refusal.stage, refusal.reason) == ("replica", "NO_REPLICA")


async def test_a_request_that_makes_no_sense_and_an_unknown_key_are_errors(mesh: Mesh) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await explain(mesh, sampling={"temperature": 9.0})
    assert from_rpc_error(caught.value).reason == Reason.REQUEST_INVALID
    mesh.metadata = [("authorization", "Bearer wrong")]
    with pytest.raises(grpc.RpcError) as caught:
        await explain(mesh)
    assert from_rpc_error(caught.value).reason == Reason.KEY_INVALID


async def test_sampled_requests_pass_the_cache_by_unless_they_ask_for_it(mesh: Mesh) -> None:
    sampled = {"temperature": 1.0}
    assert (await explain(mesh, sampling=sampled)).cache == "bypass"
    assert (await explain(mesh, sampling=sampled, cache_policy=pb.CACHE_POLICY_ALWAYS)).cache == "asked"
    assert (await explain(mesh, cache_policy=pb.CACHE_POLICY_BYPASS)).cache == "bypass"


async def test_without_the_ledger_it_says_so_and_tells_no_figures(mesh: Mesh) -> None:
    mesh.ledger._script = None
    told = await explain(mesh)
    assert told.ledger == "emergency"
    assert not any(limit.HasField("left") for limit in told.limits)


async def test_a_queue_is_told(mesh: Mesh) -> None:
    for worker in mesh.workers:
        worker.load.waiting = worker.load.waiting_limit = 4
        worker.changed.set()
    async with asyncio.timeout(60):
        while any(r.state is None or r.state.waiting != 4 for r in mesh.fleet.replicas):
            await asyncio.sleep(0.005)
    told = await explain(mesh)
    assert told.HasField("queue_seconds")
    assert told.routing.replica


class TestBreaker:
    @pytest.fixture
    def holder(self) -> KeyConfig:
        return key(risk="enforce")

    async def test_an_open_breaker_is_told_and_no_probe_of_it_is_taken(self, mesh: Mesh) -> None:
        for number in range(10):
            with pytest.raises((grpc.RpcError, MeshError)):
                await run(mesh, f"attack {number}")
        told = await explain(mesh)
        (refusal,) = told.refusals
        assert (refusal.stage, refusal.reason) == ("risk", "BREAKER_OPEN")
        assert told.admission.risk > 0
