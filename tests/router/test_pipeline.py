"""The way of a request through the real router, amid fake peers over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.config import KeyConfig
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.book import tokens_charged
from tests.router.calls import collect, failure, text_of
from tests.waiting import until


async def test_a_stream_starts_with_its_decision_and_ends_with_its_timing(mesh: Any) -> None:
    first, *middle, last = await collect(mesh.stream())
    assert first.start.routing.model == "m"
    assert first.start.routing.model_revision == "r1"
    assert set(first.start.routing.candidates) == {"w0", "w1"}
    assert first.start.input_verdict.policy_version == "p1"
    assert text_of(middle) == "Hello big world"
    assert [m.chunk.token_offset for m in middle] == [0, 1, 2]
    assert middle[-1].chunk.finish_reason == pb.FINISH_REASON_STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert 0 < last.end.timing.time_to_first_token <= last.end.timing.total
    assert (last.end.timing.queue, last.end.timing.prefill, last.end.timing.decode) == (0.5, 1.5, 2.5)
    assert not any(worker.cancelled.is_set() for worker in mesh.workers)


async def test_generate_gives_the_same_answer_whole(mesh: Any) -> None:
    request = inference_pb2.GenerateRequest(generation=mesh.generation())
    response = await mesh.stub.Generate(request, metadata=mesh.metadata)
    assert [(c.index, c.text, c.finish_reason) for c in response.choices] == [
        (0, "Hello big world", pb.FINISH_REASON_STOP)
    ]
    assert response.usage.completion_tokens == 3


@pytest.mark.parametrize("router_config", [{"guard": "", "cache": "", "overload": OverloadConfig(queue_seconds=0.05)}])
async def test_a_request_that_waits_in_vain_is_recorded_with_the_model_it_waited_for(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.load.waiting_limit = worker.load.waiting = 1
        worker.changed.set()
    async with asyncio.timeout(60):
        while any(replica.has_room(1.0) for replica in mesh.fleet.replicas):
            await asyncio.sleep(0.005)
    with capture_logs() as lines:
        error = await failure(mesh.stream())
    assert (error.reason, error.metadata["cause"]) == (Reason.OVERLOADED, "waited")
    assert [line["model"] for line in lines if line["event"] == "request"] == ["m"]


async def test_a_fault_in_mid_stream_tells_what_was_used(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.failure = MeshError(Reason.ENGINE_LOST, "the engine died")
    call, seen = mesh.stream(), []
    with pytest.raises(grpc.RpcError) as caught:
        while True:
            seen.append(await call.read())
    assert from_rpc_error(caught.value).reason == Reason.ENGINE_LOST
    assert text_of(seen) == "Hello"
    assert seen[-1].usage.completion_tokens == 1
    assert mesh.cache.calls == ["look_up", "release"]


@pytest.fixture
def holder() -> KeyConfig:
    return KeyConfig(id="k", secret_hash=hashlib.sha256(b"a-key").hexdigest(), tenant="t", tokens_per_minute=300)


async def test_every_ending_leaves_the_ledger_with_what_was_used(mesh: Any, state: Redis) -> None:
    """7 prompt tokens and 3 of answer are 10; reserved were some 20 more. Time gives back one a second."""
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], tokens_per_minute=60),))
    await collect(mesh.stream("one"))
    assert 0 < await tokens_charged(state, 60) <= 10
    before = await tokens_charged(state, 60)
    await collect(mesh.stream("one"))  # from the cache: free
    assert await tokens_charged(state, 60) <= before
    await state.flushdb()
    await failure(mesh.stream("attack"))
    assert await tokens_charged(state, 60) <= 10
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.OVERLOADED, "full")
    await state.flushdb()
    await failure(mesh.stream("two"))
    assert await tokens_charged(state) == 0


async def test_a_cancelled_stream_is_cancelled_at_the_worker_and_settled(mesh: Any, state: Redis) -> None:
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    call = mesh.stream(sampling={"max_tokens": 5_000})
    await call.read()
    await call.read()
    assert await tokens_charged(state) > 200  # the prompt's estimate, and a slice of 256
    call.cancel()
    worker = next(worker for worker in mesh.workers if worker.requests)
    await asyncio.wait_for(worker.cancelled.wait(), 60)
    async with asyncio.timeout(60):
        while await tokens_charged(state) > 10:
            await asyncio.sleep(0.005)
    await until(lambda: mesh.cache.calls[-1] == "release")


async def test_a_passed_deadline_reaches_the_worker_and_is_settled(mesh: Any, state: Redis) -> None:
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    with capture_logs() as lines:
        error = await failure(mesh.stream(timeout=4, sampling={"max_tokens": 5_000}))
        assert error.reason == Reason.DEADLINE
        worker = next(worker for worker in mesh.workers if worker.requests)
        await asyncio.wait_for(worker.cancelled.wait(), 60)
        async with asyncio.timeout(60):
            while await tokens_charged(state) > 10:
                await asyncio.sleep(0.005)
        await until(lambda: any(line["event"] == "request" for line in lines))
    assert [line["outcome"] for line in lines if line["event"] == "request"] == [Reason.DEADLINE]


class TestDefaultDeadline:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"default_deadline_seconds": 0.3}

    @pytest.mark.parametrize("part", ["guard", "cache"])
    async def test_it_bounds_the_guard_and_the_cache_too(self, mesh: Any, part: str) -> None:
        getattr(mesh, part).hold = asyncio.Event()
        mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure="allow"),))
        async with asyncio.timeout(60):
            assert (await failure(mesh.stream())).reason == Reason.DEADLINE


async def test_a_request_cancelled_while_it_reserves_gives_all_of_it_back(mesh: Any, state: Redis) -> None:
    reserve, reserved, answered = mesh.ledger.reserve, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        reservation = await reserve(*arguments)
        reserved.set()
        await answered.wait()
        return reservation

    mesh.ledger.reserve = slow
    request = inference_pb2.StreamGenerateRequest(generation=mesh.generation(sampling={"max_tokens": 5_000}))
    work = Work.begin(request, mesh.config.keys[0], ("id", "0" * 32), None, mesh.config)
    running = asyncio.ensure_future(anext(mesh.pipeline.run(work)))
    await reserved.wait()
    assert await tokens_charged(state) > 200  # the prompt's estimate, and a slice of 256
    running.cancel()
    await asyncio.wait({running}, timeout=0.05)
    answered.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await mesh.pipeline.stop()
    assert await tokens_charged(state) == 0


async def test_a_limit_that_a_key_has_not_is_not_told_as_spent(mesh: Any) -> None:
    limits = (await collect(mesh.stream()))[0].start.limits
    assert not limits.HasField("requests_remaining")
    assert 0 < limits.tokens_remaining < 300


async def test_prefixes_are_salted_by_tenant_and_cache_key_and_never_by_the_caller(mesh: Any) -> None:
    await collect(mesh.stream("a"))
    await collect(mesh.stream("b", cache_key="x"))
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], tenant="u"),))
    await collect(mesh.stream("c"))
    salts = [request.cache_salt for worker in mesh.workers for request in worker.requests]
    assert len(set(salts)) == 3
    tenants = [request.tenant for worker in mesh.workers for request in worker.requests]
    assert sorted(tenants) == ["t", "t", "u"]
    assert all(len(salt) == 16 for salt in salts)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=200), method=st.sampled_from(["StreamGenerate", "Generate", "ListModels", "CountTokens"])
)
async def test_malformed_bytes_get_a_typed_error_and_leave_a_living_router(mesh: Any, data: bytes, method: str) -> None:
    kind = mesh.channel.unary_stream if method == "StreamGenerate" else mesh.channel.unary_unary
    call = kind(f"/meshlm.v1.InferenceService/{method}")(data, metadata=mesh.metadata, timeout=60)
    if method == "StreamGenerate":
        with contextlib.suppress(grpc.RpcError):
            await collect(call)
    assert await call.code() in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
    )
    assert (await mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=mesh.metadata)).models
