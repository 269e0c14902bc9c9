"""CountTokens and ExplainRoute have an allowance of their own; ListModels has none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.config import KeyConfig, TenantConfig
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.calls import collect
from tests.router.mesh import Mesh, key

Ask = Callable[[Mesh], Awaitable[Any]]


async def count(mesh: Mesh) -> Any:
    request = inference_pb2.CountTokensRequest(input=pb.Input(prompt="hi"))
    return await mesh.stub.CountTokens(request, metadata=mesh.metadata, timeout=60)


async def explain(mesh: Mesh) -> Any:
    request = inference_pb2.ExplainRouteRequest(generation=mesh.generation())
    return await mesh.stub.ExplainRoute(request, metadata=mesh.metadata, timeout=60)


async def refused(asking: Awaitable[Any]) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await asking
    return from_rpc_error(caught.value)


class TestOfAKey:
    @pytest.fixture
    def holder(self) -> KeyConfig:
        return key(requests_per_minute=3)

    @pytest.mark.parametrize("ask", [count, explain])
    async def test_questions_above_the_allowance_are_refused_with_the_time_to_wait(self, mesh: Mesh, ask: Ask) -> None:
        for _ in range(3):
            await ask(mesh)
        asked = len(mesh.workers[0].counted) + len(mesh.workers[1].counted)
        error = await refused(ask(mesh))
        assert error.reason == Reason.RATE_LIMITED
        assert error.metadata["limit"] == "inquiries_per_minute"
        assert error.metadata["holder"] == "key"
        assert 10 < (error.retry_after or 0) <= 20
        assert len(mesh.workers[0].counted) + len(mesh.workers[1].counted) == asked  # no worker was asked

    async def test_the_store_forgets_a_question_within_a_minute(self, mesh: Mesh, state: Redis) -> None:
        """Nothing settles it: it would lie there for as long as a reservation may last."""
        await count(mesh)
        (name,) = await state.keys("meshlm:{t}:reservation:*/inquiry/*")
        assert 0 < await state.pttl(name) <= 60_000

    async def test_both_share_it_and_requests_have_their_own(self, mesh: Mesh) -> None:
        await count(mesh)
        await explain(mesh)
        await count(mesh)
        assert (await refused(explain(mesh))).reason == Reason.RATE_LIMITED
        for number in range(3):
            await collect(mesh.stream(f"n {number}"))
        assert (await refused(collect(mesh.stream("one more")))).metadata["limit"] == "requests_per_minute"

    async def test_a_question_that_makes_no_sense_is_not_counted(self, mesh: Mesh) -> None:
        for _ in range(5):
            request = inference_pb2.CountTokensRequest()
            error = await refused(mesh.stub.CountTokens(request, metadata=mesh.metadata, timeout=60))
            assert error.reason == Reason.REQUEST_INVALID
        await count(mesh)

    async def test_the_list_of_models_is_free(self, mesh: Mesh) -> None:
        for _ in range(20):
            listed = await mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=mesh.metadata, timeout=60)
            assert listed.models

    async def test_questions_side_by_side_get_no_more(self, mesh: Mesh) -> None:
        answers = await asyncio.gather(*(count(mesh) for _ in range(20)), return_exceptions=True)
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 3


class TestOfATenant:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"tenants": {"t": TenantConfig(requests_per_minute=2)}}

    async def test_all_its_keys_share_it(self, mesh: Mesh) -> None:
        await count(mesh)
        await count(mesh)
        error = await refused(count(mesh))
        assert (error.metadata["holder"], error.metadata["holder_id"]) == ("tenant", "t")


class TestWithoutALimit:
    @pytest.fixture
    def holder(self) -> KeyConfig:
        return key(tokens_per_minute=1)  # of nothing that a question uses

    async def test_nothing_is_asked_of_the_store(self, mesh: Mesh, state: Redis) -> None:
        for _ in range(5):
            await count(mesh)
        assert await state.keys("*") == []
