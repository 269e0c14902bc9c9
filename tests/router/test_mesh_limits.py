"""Limits on the whole mesh, as real processes with the fake engine: the two pains that gateways' users report, and the
deaths of the processes that keep the account."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.spans import read_trace
from meshlm.mesh.client import AsyncMesh, End, Start, Text
from meshlm.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from tests.mesh.rig import DEADLINE, Rig, running
from tests.ports import free_port
from tests.waiting import until

pytestmark = pytest.mark.mesh

SECRET = "0" * 63 + "3"
LIMIT = 1000
# A token costs one micro-unit.
PRICES = "[router.prices.fake]\nprompt = 1_000_000\ncompletion = 1_000_000\n"


@asynccontextmanager
async def limited(limits: str, *, step: float = 0.001, before: str = "", **more: Any) -> AsyncIterator[Rig]:
    """A mesh with one key that has `limits`; `before`: more of the router's server, and of the router."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    keys = f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{digest}"\n{limits}\n'
    async with running(extra=before + PRICES + keys, step=step, **more) as rig:
        rig.client = AsyncMesh(rig.mesh.target, key=SECRET, deadline=DEADLINE)

        async def ready() -> bool:
            return any(m.ready_replicas for m in await rig.client.list_models())

        await until(ready)
        yield rig


async def read(stream: Any) -> tuple[list[Any], MeshError | None]:
    """All events of a stream, and how it failed."""
    events: list[Any] = []
    try:
        async for event in stream:
            events.append(event)  # noqa: PERF401  what came before an error is wanted too
    except MeshError as error:
        return events, error
    return events, None


async def spent(rig: Rig) -> int:
    """Micro-units charged to the day."""
    client: Redis = Redis.from_url(f"unix://{rig.folder.socket('valkey')}")
    try:
        return int(await client.get("meshlm:{t}:key:k:micros_per_day") or 0)
    finally:
        await client.aclose()


def told(events: list[Any]) -> int:
    """Tokens of input and answer, as the last message with text or end says."""
    usage = next(event.usage for event in reversed(events) if isinstance(event, Text | End))
    return int(usage.prompt_tokens + usage.completion_tokens)


@pytest.mark.parametrize("limit", ["micros_per_day", "tokens_per_minute", "completion_tokens_per_minute"])
async def test_a_limit_of_1000_tokens_lets_no_more_than_1016_through(limit: str) -> None:
    async with limited(f"{limit} = {LIMIT}") as rig:
        began = time.monotonic()
        events, error = await read(rig.stream("hello", max_tokens=2000, cache="bypass"))
        refill = 0.0 if limit == "micros_per_day" else LIMIT / 60 * (time.monotonic() - began)
        assert error is not None
        assert (error.reason, error.metadata["limit"]) == (Reason.BUDGET_SPENT, limit)
        end = events[-1]
        assert isinstance(end, End)
        assert end.finish_reasons == {0: "budget_spent"}
        sent = sum(event.token_count for event in events if isinstance(event, Text))
        assert sent == end.usage.completion_tokens == int(error.metadata["completion_tokens"])
        through = sent if limit == "completion_tokens_per_minute" else told(events)
        assert LIMIT / 2 < through <= LIMIT + 16 + refill  # it ends before the message that would pass the limit
        await until(rig.idle)

        async def cancelled() -> bool:
            return (await rig.load()).counters.cancelled == 1

        await until(cancelled)


async def test_a_token_a_message_is_let_through_to_the_very_last() -> None:
    async with limited(f"micros_per_day = {LIMIT}", interval=0.0, step=0.002) as rig:
        events, error = await read(rig.stream("hello", max_tokens=1500, cache="bypass"))
        assert error is not None
        assert LIMIT - 16 <= told(events) <= LIMIT
        assert events[-1].cost_micros == told(events)
        await until(lambda: _is(rig, told(events)))


@pytest.mark.parametrize("choices", [1, 3])
async def test_streams_side_by_side_get_no_more_together(choices: int) -> None:
    async with limited(f"micros_per_day = {LIMIT}") as rig:
        streams = [rig.stream(f"n {n}", max_tokens=600, cache="bypass", temperature=1.0, n=choices) for n in range(5)]
        results = await asyncio.gather(*(read(stream) for stream in streams))
        errors = [error for _, error in results if error is not None]
        assert errors
        assert {error.reason for error in errors} == {Reason.BUDGET_SPENT}
        total = sum(told(events) for events, _ in results if any(isinstance(e, Text | End) for e in events))
        assert LIMIT / 2 < total <= LIMIT
        await until(lambda: _is(rig, total))
        with pytest.raises(MeshError) as caught:
            await rig.client.generate(messages=[("user", "hello")], max_tokens=500, n=choices)
        assert caught.value.reason == Reason.BUDGET_SPENT


async def test_an_aborted_stream_is_billed_exactly_what_was_sent() -> None:
    """Stopped, not slow: once the worker stands still nothing more comes, whatever was on its way has come."""
    async with limited(f"micros_per_day = {LIMIT}", before="", step=0.05) as rig:
        stopped = False
        events: list[Any] = []
        with pytest.raises(MeshError) as caught:
            async for event in rig.stream("hello", max_tokens=500, cache="bypass", deadline=9):
                events.append(event)
                if isinstance(event, Text) and event.token_offset > 20 and not stopped:
                    stopped = True
                    os.kill(rig.mesh.pid("one"), signal.SIGSTOP)
        assert caught.value.reason == Reason.DEADLINE
        os.kill(rig.mesh.pid("one"), signal.SIGCONT)
        sent = sum(event.token_count for event in events if isinstance(event, Text))
        prompt = next(event.usage.prompt_tokens for event in events if isinstance(event, Text))
        assert told(events) == prompt + sent
        await until(lambda: _is(rig, prompt + sent))


async def test_a_stream_whose_worker_is_killed_is_billed_exactly_what_was_sent() -> None:
    alone = "[router.streams]\nresumes = 0\n"
    async with limited(f"micros_per_day = {LIMIT}", step=0.01, before=alone) as rig:
        killed = False
        events: list[Any] = []
        with pytest.raises(MeshError):
            async for event in rig.stream("hello", max_tokens=500, cache="bypass"):
                events.append(event)
                if isinstance(event, Text) and event.token_offset > 20 and not killed:
                    killed = True
                    rig.kill("one")
        await until(lambda: _is(rig, told(events)))


async def test_a_cancelled_stream_is_billed_what_it_was_told_before_it_left() -> None:
    async with limited(f"micros_per_day = {LIMIT}", step=0.05) as rig:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        chat = generation_pb2.Chat(messages=[generation_pb2.Message(role="user", content="hello")])
        sampling = generation_pb2.Sampling(temperature=0, max_tokens=500)
        generation = generation_pb2.Generation(input=generation_pb2.Input(chat=chat), sampling=sampling)
        request = inference_pb2.StreamGenerateRequest(generation=generation)
        call = stub.StreamGenerate(request, metadata=[("authorization", f"Bearer {SECRET}")])
        while (message := await call.read()).usage.completion_tokens < 20:
            pass
        os.kill(rig.mesh.pid("one"), signal.SIGSTOP)
        while True:  # what was on its way
            reading = asyncio.ensure_future(call.read())
            done, _ = await asyncio.wait({reading}, timeout=3.0)
            if not done:
                break
            message = reading.result()
        call.cancel()
        os.kill(rig.mesh.pid("one"), signal.SIGCONT)
        await until(lambda: _is(rig, message.usage.prompt_tokens + message.usage.completion_tokens))


async def _is(rig: Rig, tokens: int) -> bool:
    return await spent(rig) == tokens


async def test_a_killed_router_leaves_no_place_taken_for_longer_than_its_lease() -> None:
    router = "[router]\nlease_seconds = 6.0\n"
    async with limited("concurrent_streams = 1", step=0.02, before=router) as rig:
        stream = rig.stream("hello", max_tokens=2000, cache="bypass")
        await anext(stream)
        with pytest.raises(MeshError) as caught:
            await rig.text("another")
        assert caught.value.metadata["limit"] == "concurrent_streams"
        rig.kill("router")
        with pytest.raises(MeshError):
            await read_on(stream)

        async def served() -> bool:
            try:
                return bool(await rig.text("another", max_tokens=5))
            except MeshError as error:
                assert error.reason in (Reason.NO_REPLICA, Reason.RATE_LIMITED, Reason.MODEL_UNKNOWN)
                return False

        await until(served)


async def read_on(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_without_a_ledger_the_share_is_in_force_and_trace_metric_and_log_say_so() -> None:
    port = free_port()
    before = f'admin_listen = "127.0.0.1:{port}"\n[state]\nredis_url = "unix:///nowhere"\n'
    async with limited("tokens_per_minute = 10_000\nrequests_per_minute = 20", before=before) as rig:
        events = [event async for event in rig.stream("hello", max_tokens=5)]
        start = next(event for event in events if isinstance(event, Start))
        assert await rig.text("hello", max_tokens=5)
        with pytest.raises(MeshError) as caught:  # a tenth of 20
            await rig.text("hello", max_tokens=5)
        assert caught.value.metadata["limit"] == "requests_per_minute"

        def modes() -> set[Any]:
            spans = read_trace(str(rig.folder.spans), start.trace_id)
            return {span.attributes.get("meshlm.ledger.mode") for span in spans if span.name == "router.admit"}

        await until(lambda: modes() == {"emergency"})
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics") as page:
            metrics = page.read().decode()
        values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("meshlm_"))
        assert [v for name, v in values.items() if name.startswith("meshlm_ledger_emergency")] == ["1.0"]
        refusals = {name: v for name, v in values.items() if name.startswith("meshlm_ledger_refusals_total")}
        assert [v for name, v in refusals.items() if 'limit="requests_per_minute"' in name] == ["1.0"]
        assert any(name.startswith("meshlm_ledger_tokens_charged") for name in values)
        assert "the ledger does not answer" in "".join(f.read_text() for f in rig.folder.logs.iterdir())
