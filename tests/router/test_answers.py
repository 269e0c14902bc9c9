"""Which answers come from the cache and which are kept there, and that a cache that fails costs an answer at most."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from meshlm.v1 import generation_pb2 as pb
from tests.router.calls import collect, text_of
from tests.waiting import until


async def test_the_same_request_again_comes_from_the_cache_and_runs_nothing(mesh: Any) -> None:
    first = await collect(mesh.stream())
    second = await collect(mesh.stream())
    assert text_of(second) == text_of(first)
    assert second[0].start.routing.reason == "cache_hit"
    assert second[-1].usage == first[-1].usage
    assert sum(len(worker.requests) for worker in mesh.workers) == 1


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": None}])
async def test_a_request_with_chance_in_it_is_neither_looked_up_nor_stored(mesh: Any, sampling: Any) -> None:
    await collect(mesh.stream(sampling=sampling))
    assert mesh.cache.calls == []
    await collect(mesh.stream(sampling=sampling, cache_policy=pb.CACHE_POLICY_ALWAYS))
    assert mesh.cache.calls == ["look_up", "store"]


async def test_answers_to_prompts_with_control_tokens_are_asked_for_as_such(mesh: Any) -> None:
    source = pb.Input(prompt="<|im_start|>")
    await collect(mesh.stream(input=source))
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], raw_prompts=True),))
    await collect(mesh.stream(input=source))
    assert [lookup.allow_control_tokens for lookup in mesh.cache.lookups] == [False, True]


async def test_an_answer_made_under_another_policy_is_made_anew(mesh: Any) -> None:
    await collect(mesh.stream())
    mesh.guard.policy = "p2"
    second = await collect(mesh.stream())
    assert second[0].start.routing.reason != "cache_hit"
    assert mesh.cache.calls == ["look_up", "store", "look_up", "look_up_refresh", "store"]
    assert (await collect(mesh.stream()))[0].start.routing.reason == "cache_hit"


async def test_an_answer_that_the_guard_did_not_judge_is_given_once_and_not_kept(mesh: Any) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure="allow"),))
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    reading = asyncio.ensure_future(collect(mesh.stream()))
    await until(lambda: any(worker.requests for worker in mesh.workers) and mesh.guard.inputs)
    mesh.guard.down = True
    for worker in mesh.workers:
        worker.hold.set()
    assert text_of(await reading) == "Hello big world"
    assert mesh.cache.calls == ["look_up", "release"]


async def test_an_answer_of_other_weights_than_were_looked_up_is_not_kept(mesh: Any) -> None:
    mesh.cache.hold = asyncio.Event()
    reading = asyncio.ensure_future(collect(mesh.stream()))
    await until(lambda: mesh.cache.calls)
    for worker in mesh.workers:
        worker.load.model.revision = "r2"
        worker.changed.set()
    await until(lambda: all(replica.state.model.revision == "r2" for replica in mesh.fleet.replicas))
    mesh.cache.hold.set()
    assert (await reading)[0].start.routing.model_revision == "r2"
    assert mesh.cache.calls == ["look_up", "release"]


async def test_a_flight_whose_answer_cannot_be_stored_is_released(mesh: Any) -> None:
    mesh.cache.full = True
    await collect(mesh.stream())
    assert mesh.cache.calls == ["look_up", "store", "release"]


async def test_a_cache_that_fails_is_a_miss(mesh: Any) -> None:
    mesh.cache.down = True
    assert text_of(await collect(mesh.stream())) == "Hello big world"


class TestHangingCache:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"cache_seconds": 0.5}

    async def test_it_is_a_miss(self, mesh: Any) -> None:
        mesh.cache.hold = asyncio.Event()
        assert text_of(await collect(mesh.stream())) == "Hello big world"

    @pytest.mark.parametrize("router_config", [{"cache_seconds": 0.5, "cache_retry_seconds": 600.0}])
    async def test_only_the_first_request_waits_for_it(self, mesh: Any) -> None:
        mesh.cache.hold = asyncio.Event()
        for number in range(3):
            assert text_of(await collect(mesh.stream(f"hi {number}"))) == "Hello big world"
        assert len(mesh.cache.lookups) == 1

    @pytest.mark.parametrize("router_config", [{"cache_seconds": 0.5, "cache_retry_seconds": 0.01}])
    async def test_one_that_answers_again_is_found_out(self, mesh: Any) -> None:
        mesh.cache.hold = asyncio.Event()
        await collect(mesh.stream())
        mesh.cache.hold.set()
        async with asyncio.timeout(60):
            while (await collect(mesh.stream()))[0].start.routing.reason != "cache_hit":
                await asyncio.sleep(0.01)

    @pytest.mark.parametrize("router_config", [{"cache_seconds": 600.0, "cache_retry_seconds": 600.0}])
    async def test_a_flight_that_cannot_be_ended_holds_up_no_answers_end(self, mesh: Any) -> None:
        """It is tried all the same: whoever asks the same waits for it."""
        for worker in mesh.workers:
            worker.hold = asyncio.Event()
        leading = mesh.stream()
        await leading.read()
        mesh.cache.storing = asyncio.Event()  # as one that hangs
        mesh.pipeline._answers._breaker.fail()
        for worker in mesh.workers:
            worker.hold.set()
        async with asyncio.timeout(60):
            assert text_of(await collect(leading)) == "Hello big world"
        await until(lambda: mesh.cache.calls == ["look_up", "store"])
        mesh.cache.storing.set()
