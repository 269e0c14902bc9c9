"""Copies of requests for another model: who gets one, and that no caller waits or pays for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig, PriceConfig
from meshlm.router.routing.config import RouteConfig, RuleConfig, ShadowConfig, TargetConfig
from meshlm.v1 import generation_pb2 as pb
from tests.router.book import tokens_charged
from tests.router.calls import collect, failure, text_of
from tests.router.mesh import Mesh, key
from tests.waiting import until


def route(share: float = 1.0, **more: Any) -> RouteConfig:
    rule = RuleConfig(targets=(TargetConfig(model="m"),))
    return RouteConfig(rules=(rule,), shadow=ShadowConfig(model="copied", share=share, **more))


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {
        "region": "eu-1",
        "aliases": {"copied": "n"},
        "prices": {name: PriceConfig(prompt=1_000_000, completion=1_000_000) for name in ("m", "n")},
        "routes": {
            "r": route(max_tokens=4, concurrency=2),
            "half": route(0.5, concurrency=1000),
        },
    }


@pytest.fixture
def holder() -> KeyConfig:
    return key(tokens_per_minute=6000, raw_prompts=True)


@pytest.fixture
async def two(mesh: Mesh) -> Mesh:
    """w0 serves `m`, w1 serves `n`."""
    load = mesh.workers[1].load
    load.model.name, load.model.revision = "n", "r2"
    mesh.workers[1].changed.set()
    await until(lambda: set(mesh.fleet.models()) == {"m", "n"})
    return mesh


async def settled(mesh: Mesh) -> None:
    """All requests that are over are settled, and their copies begun or not."""
    await until(lambda: not mesh.pipeline._settling)


async def test_a_whole_answer_is_followed_by_a_copy_with_the_least_priority_and_its_own_limits(two: Mesh) -> None:
    sampling = {"max_tokens": 10, "min_tokens": 6, "n": 1}
    await collect(two.stream(model="r", session="s", sampling=sampling, labels={"a": "b"}))
    await until(lambda: two.workers[1].requests)
    (copy,) = two.workers[1].requests
    assert (copy.generation.model, copy.generation.priority) == ("n", pb.PRIORITY_BATCH)
    assert (copy.generation.sampling.max_tokens, copy.generation.sampling.min_tokens) == (4, 4)
    assert copy.tenant == "(shadow)"  # no configured tenant can have this name
    assert copy.generation.input == two.workers[0].requests[0].generation.input
    assert copy.cache_salt == two.workers[0].requests[0].cache_salt


async def test_nobody_is_told_or_charged_anything_of_it(two: Mesh, state: Redis) -> None:
    two.workers[1].prompt_tokens = 1000
    with capture_logs() as logs:
        first, *middle, last = await collect(two.stream(model="r"))
        await until(lambda: any(line["event"] == "shadow" for line in logs))
    assert (first.start.routing.model, text_of(middle), last.end.cost_micros) == ("m", "Hello big world", 10)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert await tokens_charged(state, 6000) <= 10
    line = next(line for line in logs if line["event"] == "shadow")
    assert (line["model"], line["outcome"], line["prompt_tokens"], line["completion_tokens"]) == (
        "n",
        "complete",
        1000,
        3,
    )


async def test_a_copy_that_hangs_holds_back_neither_its_request_nor_the_routers_end(two: Mesh) -> None:
    two.workers[1].hold = asyncio.Event()  # never set
    for number in range(3):
        assert text_of(await collect(two.stream(f"hi {number}", model="r"))) == "Hello big world"
    await until(lambda: len(two.workers[1].requests) == 2)
    await settled(two)
    assert len(two.workers[1].requests) == 2  # as many at a time as are configured
    async with asyncio.timeout(60):
        await two.pipeline.stop()
    async with asyncio.timeout(60):
        await two.workers[1].cancelled.wait()


async def test_a_place_that_a_copy_leaves_is_free_again(two: Mesh) -> None:
    for number in range(5):
        await collect(two.stream(f"hi {number}", model="r"))
        await until(lambda wanted=number + 1: len(two.workers[1].requests) == wanted)
        await until(lambda: not two.pipeline._shadows._tasks)


async def test_a_model_that_others_wait_for_gets_no_copies(two: Mesh) -> None:
    two.workers[1].load.waiting = 1
    two.workers[1].changed.set()
    await until(lambda: two.fleet.replicas[1].state.waiting == 1)
    await collect(two.stream(model="r"))
    await settled(two)
    assert two.workers[1].requests == []


@pytest.mark.parametrize("case", ["attack", "secret", "cached", "token ids", "failed", "unjudged"])
async def test_what_was_refused_stopped_cached_or_not_judged_is_not_copied(two: Mesh, case: str) -> None:
    asked: dict[str, Any] = {}
    if case == "attack":
        assert (await failure(two.stream("attack", model="r"))).reason == Reason.INJECTION_SUSPECTED
    elif case == "failed":
        two.workers[0].refusal = MeshError(Reason.CONTEXT_TOO_LONG, "too long")
        await failure(two.stream(model="r"))
    else:
        if case == "secret":
            two.workers[0].pieces = ["a ", "secret ", "word"]
        if case == "token ids":
            asked["input"] = pb.Input(token_ids=pb.TokenIds(ids=[1]))
        if case == "unjudged":
            two.guard.down = True
            two.rekey((key(guard_failure="allow", raw_prompts=True),))
        if case == "cached":
            await collect(two.stream(model="m"))
        await collect(two.stream(model="r", **asked))
    await settled(two)
    assert two.workers[1].requests == []


async def test_a_cancelled_request_is_not_copied(two: Mesh) -> None:
    two.workers[0].hold = asyncio.Event()
    call = two.stream(model="r")
    await call.read()
    call.cancel()
    async with asyncio.timeout(60):
        await two.workers[0].cancelled.wait()
    await settled(two)
    assert two.workers[1].requests == []


async def test_a_share_of_requests_is_copied_and_the_decision_says_which(two: Mesh) -> None:
    told = 0
    for number in range(60):
        first, *_ = await collect(two.stream(f"hi {number}", model="half"))
        told += any(step.stage == "shadow" and step.model == "n" for step in first.start.routing.steps)
    await until(lambda: len(two.workers[1].requests) == told)
    assert 12 < told < 48  # six standard deviations about 30


async def test_a_shadow_that_is_down_costs_nothing(two: Mesh) -> None:
    two.workers[1].load.ready = False
    two.workers[1].changed.set()
    await until(lambda: not two.fleet.ready("n"))
    assert text_of(await collect(two.stream(model="r"))) == "Hello big world"


async def test_a_copy_goes_nowhere_where_its_request_could_not(two: Mesh) -> None:
    two.workers[0].load.region, two.workers[1].load.region = "eu-1", "us-1"
    for worker in two.workers:
        worker.changed.set()
    await until(lambda: [replica.state.region for replica in two.fleet.replicas] == ["eu-1", "us-1"])
    two.rekey((key(regions=("eu",)),))
    assert text_of(await collect(two.stream(model="r"))) == "Hello big world"
    await settled(two)
    assert two.workers[1].requests == []


async def test_the_half_of_a_replicas_places_that_is_for_callers_is_never_a_copys(two: Mesh) -> None:
    replica = two.fleet.replicas[1]
    taken = []
    while replica.has_room(0.5):
        taken.append(replica.begin(None, 1))
    assert replica.has_room(0.9)
    await collect(two.stream(model="r"))
    await settled(two)
    assert two.workers[1].requests == []
    for attempt in taken:
        attempt.end()
    await collect(two.stream("again", model="r"))
    await until(lambda: two.workers[1].requests)
