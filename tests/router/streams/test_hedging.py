"""Hedged prefill, amid peers that answer as a test says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.streams.config import StreamsConfig
from meshlm.router.streams.hedging import Hedges
from tests.router.calls import collect, failure, text_of
from tests.waiting import until


def test_nothing_is_hedged_before_enough_is_known_and_then_by_the_percentile_of_such_prompts() -> None:
    hedges = Hedges(90.0)
    for number in range(19):
        hedges.note(100, number / 10)
    assert hedges.delay(100) is None
    hedges.note(100, 1.9)
    assert hedges.delay(100) == 1.8
    assert hedges.delay(1000) is None
    off = Hedges(0.0)
    for _ in range(100):
        off.note(100, 1.0)
    assert off.delay(100) is None


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {"streams": StreamsConfig(hedge_percentile=50.0)}


@pytest.fixture
async def warm(mesh: Any) -> Any:
    """Enough quick answers, and then a first worker that is late."""
    for number in range(24):
        await collect(mesh.stream(f"hi {number}"))
    for worker in mesh.workers:
        worker.requests.clear()
    mesh.workers[1].load.running = 50
    mesh.workers[1].changed.set()
    await until(lambda: mesh.fleet.replicas[1].state.running == 50)
    mesh.workers[0].late = asyncio.Event()
    return mesh


class TestRace:
    async def test_a_late_worker_loses_to_a_second_one_and_is_cancelled(self, warm: Any) -> None:
        responses = await collect(warm.stream("x"))
        assert text_of(responses) == "Hello big world"
        assert responses[0].start.routing.replica == "w0"
        assert list(responses[-1].end.replicas) == ["w1"]
        assert responses[-1].usage.prompt_tokens == 7
        await asyncio.wait_for(warm.workers[0].cancelled.wait(), 60)

    async def test_a_second_worker_that_refuses_changes_nothing(self, warm: Any) -> None:
        warm.workers[1].refusal = MeshError(Reason.OVERLOADED, "full")
        call = warm.stream("x")
        reading = asyncio.ensure_future(collect(call))
        await until(lambda: warm.workers[1].requests)
        warm.workers[0].late.set()
        assert text_of(await reading) == "Hello big world"

    async def test_a_second_worker_that_never_accepts_holds_nothing_up(self, warm: Any) -> None:
        warm.workers[1].accepts = asyncio.Event()
        reading = asyncio.ensure_future(collect(warm.stream("x")))
        await until(lambda: warm.workers[1].requests)
        warm.workers[0].late.set()
        responses = await asyncio.wait_for(reading, 60)
        assert text_of(responses) == "Hello big world"
        assert list(responses[-1].end.replicas) == ["w0"]
        await asyncio.wait_for(warm.workers[1].cancelled.wait(), 60)

    async def test_a_caller_who_leaves_cancels_both(self, warm: Any) -> None:
        warm.workers[1].late = asyncio.Event()
        call = warm.stream("x")
        await call.read()
        await until(lambda: all(worker.requests for worker in warm.workers))
        call.cancel()
        for worker in warm.workers:
            await asyncio.wait_for(worker.cancelled.wait(), 60)


class TestWithoutBudget:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"streams": StreamsConfig(hedge_percentile=50.0, retry_share=0.0, retries_per_second=0.0)}

    async def test_nothing_is_hedged(self, warm: Any) -> None:
        assert (await failure(warm.stream("x", timeout=0.5))).reason == Reason.DEADLINE
        assert not warm.workers[1].requests
