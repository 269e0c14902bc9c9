"""An EU tenant's request never reaches another region: not its workers, not its cache, not its guard."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.config import KeyConfig, RouterConfig, TenantConfig
from meshlm.router.replicas.residency import Regions, Residency
from meshlm.v1 import inference_pb2
from tests.router.mesh import Mesh, key


async def tell_region(mesh: Mesh, *regions: str) -> None:
    for worker, region in zip(mesh.workers, regions, strict=True):
        worker.load.region = region
        worker.changed.set()
    async with asyncio.timeout(60):
        while [r.state.region for r in mesh.fleet.replicas if r.state is not None] != list(regions):
            await asyncio.sleep(0.005)


async def failure(call: Any) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return from_rpc_error(caught.value)


@pytest.fixture
def holder() -> KeyConfig:
    return key(regions=("eu",))


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {"region": "eu-west-1"}


async def test_only_replicas_in_the_region_are_asked(mesh: Mesh) -> None:
    await tell_region(mesh, "us-east-1", "eu-west-1")
    for number in range(6):
        start = (await mesh.stream(f"hi {number}", session=f"s{number}").read()).start
        assert (start.routing.replica, start.routing.region) == ("w1", "eu-west-1")
        told = [(c.replica, c.region, c.excluded) for c in start.routing.considered]
        assert told == [("w1", "eu-west-1", ""), ("", "us-east-1", "region")]
    assert mesh.workers[0].requests == []


async def test_with_the_region_down_the_request_is_refused_and_the_other_sees_nothing(mesh: Mesh) -> None:
    await tell_region(mesh, "us-east-1", "eu-west-1")
    mesh.workers[1].load.ready = False
    mesh.workers[1].changed.set()
    async with asyncio.timeout(60):
        while mesh.fleet.replicas[1].usable:
            await asyncio.sleep(0.005)
    error = await failure(mesh.stream())
    assert (error.reason, error.metadata["regions"]) == (Reason.NO_REPLICA_IN_REGION, "eu")
    assert error.retry_after is not None
    count = inference_pb2.CountTokensRequest(input=mesh.generation().input)
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.stub.CountTokens(count, metadata=mesh.metadata, timeout=60)
    assert from_rpc_error(caught.value).reason == Reason.NO_REPLICA_IN_REGION
    assert [worker.requests for worker in mesh.workers] == [[], []]


class TestElsewhere:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"region": "us-east-1"}

    async def test_a_router_in_another_region_refuses_before_anybody_is_asked(self, mesh: Mesh) -> None:
        await tell_region(mesh, "eu", "eu")
        error = await failure(mesh.stream())
        assert (error.reason, error.metadata["place"]) == (Reason.REGION_NOT_ALLOWED, "router")
        asked = [mesh.guard.inputs, mesh.cache.lookups, *(worker.requests for worker in mesh.workers)]
        assert asked == [[], [], [], []]


class TestCacheElsewhere:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"region": "eu", "cache_region": "us"}

    async def test_a_cache_in_another_region_is_passed_by(self, mesh: Mesh) -> None:
        await tell_region(mesh, "eu", "eu")
        for _ in range(2):
            call = mesh.stream()
            while await call.read() is not grpc.aio.EOF:
                pass
        assert mesh.cache.calls == []
        assert sum(len(worker.requests) for worker in mesh.workers) == 2


class TestGuardElsewhere:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"region": "eu", "guard_region": "us"}

    async def test_a_guard_in_another_region_never_sees_the_prompt(self, mesh: Mesh) -> None:
        await tell_region(mesh, "eu", "eu")
        error = await failure(mesh.stream())
        assert (error.reason, error.metadata["place"]) == (Reason.REGION_NOT_ALLOWED, "guard")
        assert mesh.guard.inputs == []


def test_a_key_may_narrow_its_tenants_regions_and_never_widen_them() -> None:
    tenants = {"t": TenantConfig(regions=("eu",))}
    config = RouterConfig(keys=(key(regions=("eu-west-1", "us")),), tenants=tenants, region="eu")
    regions = Residency(config).regions(config.keys[0])
    assert [place for place in ("eu-west-1", "eu-north-1", "us", "eu") if regions.allow(place)] == ["eu-west-1"]
    tenant_alone = Residency(config).regions(replace(config.keys[0], regions=()))
    assert [place for place in ("eu-west-1", "europe", "us", "eu") if tenant_alone.allow(place)] == ["eu-west-1", "eu"]


@given(st.text(max_size=8), st.text(min_size=1, max_size=8))
def test_a_region_allows_itself_and_what_begins_with_it_and_a_dash(region: str, allowed: str) -> None:
    inside = region == allowed or region.startswith(allowed + "-")
    assert Regions(((allowed,),)).allow(region) is inside
    assert Regions().allow(region)
