"""The cache over a real socket and a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.cache.config import CacheConfig
from meshlm.cache.service import CacheService
from meshlm.chassis.calls import CallInterceptor, Gate
from meshlm.chassis.channels import open_channel
from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import Reason, from_rpc_error
from meshlm.chassis.life import Life
from meshlm.v1 import cache_pb2 as c
from meshlm.v1 import cache_pb2_grpc
from meshlm.v1 import generation_pb2 as g

CONFIG = CacheConfig(max_answer_bytes=1_000, retry_seconds=0.2)


class Rig:
    def __init__(self, address: str, url: str, kind: type[CacheService] = CacheService) -> None:
        self.service: Any = kind(CONFIG, StateConfig(redis_url=url, timeout_seconds=60.0))
        self.server = grpc.aio.server(
            interceptors=[CallInterceptor(Gate())], options=[("grpc.max_receive_message_length", 64 * 1024)]
        )
        self.service.register(self.server)
        self.server.add_insecure_port(address)
        self.channel = open_channel(address)
        self.stub: Any = cache_pb2_grpc.CacheServiceStub(self.channel)
        self.redis: Any = Redis.from_url(url)

    async def look_up(self, prompt: str = "Hello", *, wait: float = 0.0, **options: Any) -> c.LookUpResponse:
        response: c.LookUpResponse = await self.stub.LookUp(lookup(prompt, wait=wait), **options)
        return response

    async def store(self, lead: c.LookUpResponse, text: str = "Hi") -> bool:
        response = await self.stub.Store(c.StoreRequest(key=lead.key, flight=lead.flight, answer=answer(text)))
        return bool(response.stored)

    async def close(self) -> None:
        await self.channel.close()
        await self.server.stop(0)
        await self.service.stop()
        await self.redis.aclose()


def lookup(prompt: str = "Hello", *, wait: float = 0.0) -> c.LookUpRequest:
    generation = g.Generation(model="m", input=g.Input(prompt=prompt))
    return c.LookUpRequest(tenant="t", generation=generation, model_revision="r", policy="p", wait_seconds=wait)


def answer(text: str) -> c.CachedAnswer:
    chunk = g.Chunk(text=text, token_count=1, finish_reason=g.FINISH_REASON_STOP)
    return c.CachedAnswer(chunks=[chunk], usage=g.Usage(prompt_tokens=3, completion_tokens=1))


@asynccontextmanager
async def running(url: str, folder: Path, kind: type[CacheService] = CacheService) -> AsyncIterator[Rig]:
    made = Rig(f"unix:{folder}/s", url, kind)
    await made.service.start(Life())
    await made.server.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def rig(valkey: Any, tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(valkey.url, tmp_path) as made:
        await made.redis.flushall()
        yield made


async def test_an_answer_comes_back_as_it_was_given_and_when(rig: Rig) -> None:
    lead = await rig.look_up()
    assert lead.outcome == c.LOOK_UP_OUTCOME_LEAD
    assert await rig.store(lead)
    hit = await rig.look_up()
    assert hit.outcome == c.LOOK_UP_OUTCOME_HIT
    assert time.time() - 60 < hit.answer.stored_at <= time.time()
    hit.answer.ClearField("stored_at")
    assert hit.answer == answer("Hi")
    assert (await rig.look_up("Hello!")).outcome == c.LOOK_UP_OUTCOME_LEAD


async def test_twenty_identical_lookups_get_one_lead(rig: Rig) -> None:
    lookups = [asyncio.create_task(rig.look_up(wait=60)) for _ in range(20)]
    done, waiting = await asyncio.wait(lookups, return_when=asyncio.FIRST_COMPLETED)
    (lead,) = [task.result() for task in done]
    assert lead.outcome == c.LOOK_UP_OUTCOME_LEAD
    assert await rig.store(lead)
    # Who came only after the store has a hit.
    outcomes = {r.outcome for r in await asyncio.gather(*waiting)}
    assert outcomes <= {c.LOOK_UP_OUTCOME_SHARED, c.LOOK_UP_OUTCOME_HIT}


async def test_an_answer_too_large_is_not_kept_and_frees_those_who_wait(rig: Rig) -> None:
    lead = await rig.look_up()
    waiting = asyncio.create_task(rig.look_up(wait=60))
    assert not await rig.store(lead, "x" * 1_000)
    assert (await waiting).outcome == c.LOOK_UP_OUTCOME_LEAD


async def test_a_wait_ends_before_the_callers_deadline(rig: Rig) -> None:
    await rig.look_up()
    for _ in range(20):  # a machine that stands still just then brings no answer in time
        with suppress(grpc.aio.AioRpcError):
            assert (await rig.look_up(wait=60, timeout=2)).outcome == c.LOOK_UP_OUTCOME_TIMEOUT
            return
    pytest.fail("the answer never came in time")


async def test_a_release_lets_the_next_one_lead(rig: Rig) -> None:
    lead = await rig.look_up()
    await rig.stub.Release(c.ReleaseRequest(key=lead.key, flight=lead.flight))
    assert (await rig.look_up()).outcome == c.LOOK_UP_OUTCOME_LEAD
    assert not await rig.store(lead)


class LateService(CacheService):
    """Has its answer, and is late with sending it."""

    def __init__(self, config: CacheConfig, state: StateConfig) -> None:
        super().__init__(config, state)
        self.has_answer = asyncio.Event()

    async def LookUp(self, request: c.LookUpRequest, context: Any) -> c.LookUpResponse:
        response = await super().LookUp(request, context)
        self.has_answer.set()
        await asyncio.Event().wait()
        return response


async def test_a_lead_that_was_won_and_could_not_be_delivered_is_given_back(valkey: Any, tmp_path: Path) -> None:
    async with running(valkey.url, tmp_path, LateService) as rig:
        await rig.redis.flushall()
        call = rig.stub.LookUp(lookup())
        await asyncio.wait_for(rig.service.has_answer.wait(), 60)
        assert await rig.redis.keys("*flight*")
        call.cancel()
        until = time.monotonic() + 60
        while await rig.redis.keys("*flight*"):
            assert time.monotonic() < until
            await asyncio.sleep(0.01)


async def test_a_lead_that_was_delivered_is_kept(rig: Rig) -> None:
    lead = await rig.look_up()
    await rig.look_up("another")
    assert await rig.store(lead)


async def test_without_redis_everything_is_a_miss_and_with_it_again_nothing_is(
    mortal_valkey: Any, tmp_path: Path
) -> None:
    async with running(mortal_valkey.url, tmp_path) as rig:
        lead = await rig.look_up()
        mortal_valkey.kill()
        for _ in range(3):
            assert (await rig.look_up(timeout=60)).outcome == c.LOOK_UP_OUTCOME_UNSPECIFIED
        assert not await rig.store(lead)
        await rig.stub.Release(c.ReleaseRequest(key=lead.key, flight=lead.flight))
        mortal_valkey.start()
        until = time.monotonic() + 60
        while (await rig.look_up()).outcome == c.LOOK_UP_OUTCOME_UNSPECIFIED:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)


async def test_a_service_starts_without_redis(tmp_path: Path) -> None:
    async with running(f"unix://{tmp_path}/none.sock", tmp_path) as rig:
        assert (await rig.look_up(timeout=60)).outcome == c.LOOK_UP_OUTCOME_UNSPECIFIED


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("LookUp", c.LookUpRequest(tenant="t"), "generation.input"),
        ("LookUp", c.LookUpRequest(generation=g.Generation(input=g.Input(prompt="a"))), "tenant"),
        ("LookUp", lookup(wait=-1), "wait_seconds"),
        ("LookUp", lookup(wait=float("nan")), "wait_seconds"),
        ("Store", c.StoreRequest(key="*", flight="f"), "key"),
        ("Store", c.StoreRequest(key="a" * 16 + ":" + "b" * 64), "flight"),
        ("Release", c.ReleaseRequest(key="a" * 16 + ":" + "b" * 63, flight="f"), "key"),
    ],
)
async def test_a_wrong_request_is_refused_by_its_field(rig: Rig, method: str, request_: Any, field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await getattr(rig.stub, method)(request_)
    error = from_rpc_error(caught.value)
    assert error.reason == Reason.REQUEST_INVALID
    assert error.metadata["field"] == field


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=400), method=st.sampled_from(["LookUp", "Store", "Release"]))
async def test_bytes_that_are_no_message_get_a_status_and_leave_the_service_alive(
    rig: Rig, junk: bytes, method: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await rig.channel.unary_unary(f"/meshlm.v1.CacheService/{method}")(junk, timeout=60)
    # INTERNAL is grpcio's own word for bytes that do not parse.
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    assert (await rig.look_up()).outcome != c.LOOK_UP_OUTCOME_UNSPECIFIED


async def test_an_oversized_message_gets_a_status_and_leaves_the_service_alive(rig: Rig) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await rig.look_up("a" * 100_000)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await rig.look_up()).outcome == c.LOOK_UP_OUTCOME_LEAD
