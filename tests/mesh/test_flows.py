"""The whole mesh as real processes, with the fake engine, while things die in it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.spans import StoredSpan, read_trace
from meshlm.mesh.client import AsyncMesh, End, Start, Text
from meshlm.v1 import generation_pb2, inference_pb2, inference_pb2_grpc
from tests.mesh.fakes import said_by_the_fake
from tests.mesh.rig import DEADLINE, LONG, NO_RESUMES, TWO, running
from tests.waiting import until

pytestmark = pytest.mark.mesh


async def broken(stream: Any, after: int, act: Callable[[], None]) -> tuple[str, MeshError]:
    """Read, `act` after so many tokens, and read on to the error."""
    text, acted = "", False
    with pytest.raises(MeshError) as caught:
        async with aclosing(stream):
            async for event in stream:
                if isinstance(event, Text):
                    text += event.text
                    if event.token_offset + event.token_count >= after and not acted:
                        acted = True
                        act()
    return text, caught.value


async def test_one_trace_leads_from_the_router_to_the_engine() -> None:
    async with running() as rig:
        events = [e async for e in rig.stream("one two three")]
        start = next(e for e in events if isinstance(e, Start))

        def spans() -> list[StoredSpan]:
            return read_trace(str(rig.folder.spans), start.trace_id)

        wanted = {
            ("router", "StreamGenerate"), ("router", "router.risk"), ("router", "router.admit"), ("router", "LookUp"),
            ("cache", "LookUp"),
            ("router", "CheckInput"), ("guard", "CheckInput"), ("guard", "CheckOutput"), ("router", "RunGeneration"),
            ("worker", "RunGeneration"), ("worker", "engine.queue"), ("worker", "engine.prefill"),
            ("worker", "engine.decode"), ("router", "router.settle"), ("router", "Store"), ("cache", "Store"),
        }  # fmt: skip

        def seen() -> set[tuple[str, str]]:
            return {(s.service.removeprefix("meshlm-"), s.name.rpartition("/")[2]) for s in spans()}

        def roots() -> list[str]:
            ids = {span.span_id for span in spans()}
            return [span.name for span in spans() if span.parent_id not in ids]

        await until(lambda: wanted <= seen())
        await until(lambda: roots() == ["meshlm.v1.InferenceService/StreamGenerate"])
        assert not any("one two three" in str(span.attributes) for span in spans())

        def logs() -> str:
            return "".join(file.read_text() for file in rig.folder.logs.iterdir())

        await until(lambda: start.request_id in logs())
        assert "one two three" not in logs()


async def test_a_killed_engine_ends_its_streams_with_a_reason_and_a_new_one_serves() -> None:
    async with running(extra=NO_RESUMES) as rig:
        stream = rig.stream("hello", cache="bypass", max_tokens=LONG)
        text, error = await broken(stream, 10, rig.engine().kill)
        assert error.reason == Reason.ENGINE_LOST
        assert said_by_the_fake("hello", LONG).startswith(text)

        async def again() -> bool:
            load = await rig.load()
            return load.ready and load.counters.engine_starts == 2 and await rig.ready()

        await until(again)
        assert await rig.text("hello", cache="bypass") == said_by_the_fake("hello", 60)


async def test_a_hung_engine_is_noticed_and_replaced() -> None:
    async with running(extra=NO_RESUMES, hang=5.0) as rig:
        stream = rig.stream("hello", cache="bypass", max_tokens=LONG)
        _, error = await broken(stream, 10, rig.engine().suspend)
        assert error.reason == Reason.ENGINE_LOST

        async def again() -> bool:
            load = await rig.load()
            return load.ready and load.counters.engine_starts == 2 and await rig.ready()

        await until(again)
        assert await rig.text("hello", cache="bypass")


async def test_a_killed_worker_costs_its_stream_and_a_resumed_one_has_no_gap() -> None:
    async with running(TWO, extra=NO_RESUMES) as rig:
        text, killed = "", False
        async for event in rig.stream("hello", cache="bypass", resumes=2, max_tokens=150):
            if isinstance(event, Start) and not killed:
                replica = event.routing.replica
            if isinstance(event, Text):
                text += event.text
                if event.token_offset >= 10 and not killed:
                    killed = True
                    rig.kill(replica)
            if isinstance(event, End):
                assert event.usage.completion_tokens == 150
        assert killed
        assert text == said_by_the_fake("hello", 150)


async def test_a_killed_cache_costs_nothing_but_hits() -> None:
    async with running() as rig:
        whole = await rig.text("hello")
        text, killed = "", False
        async for event in rig.stream("hello again"):
            if isinstance(event, Text):
                if not killed:
                    killed = True
                    rig.kill("cache")
                text += event.text
        assert killed
        assert len(text) == len(whole)

        async def hit() -> bool:
            starts = [e async for e in rig.stream("hello") if isinstance(e, Start)]
            return bool(starts[0].routing.reason == "cache_hit")

        await until(hit)


async def test_a_killed_valkey_costs_neither_streams_nor_service() -> None:
    secret = "0" * 63 + "1"
    keys = f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{_digest(secret)}"\ntokens_per_minute = 100000\n'
    async with running(extra=keys) as rig:
        rig.client = AsyncMesh(rig.mesh.target, key=secret, deadline=DEADLINE)

        async def ready() -> bool:
            return any(m.ready_replicas for m in await rig.client.list_models())

        await until(ready)
        text, killed = "", False
        async for event in rig.stream("hello"):
            if isinstance(event, Text):
                if not killed:
                    killed = True
                    rig.kill("valkey")
                text += event.text
        assert text == said_by_the_fake("hello", 60)
        assert await rig.text("hello two") != ""


async def test_a_killed_guard_refuses_and_then_serves_again() -> None:
    async with running() as rig:
        stream = rig.stream("hello", cache="bypass", max_tokens=LONG)
        text, error = await broken(stream, 10, lambda: rig.kill("guard"))
        assert error.reason == Reason.GUARD_UNAVAILABLE
        assert text

        async def served() -> bool:
            try:
                return bool(await rig.text("hello", cache="bypass"))
            except MeshError as refused:
                assert refused.reason == Reason.GUARD_UNAVAILABLE
                return False

        await until(served)


async def test_a_mesh_that_ends_lets_streams_in_flight_end_whole() -> None:
    async with running() as rig:
        tokens, stopping = 0, None
        async for event in rig.stream("hello", cache="bypass", max_tokens=100):
            if isinstance(event, Text):
                tokens += event.token_count
                if stopping is None:
                    stopping = asyncio.ensure_future(rig.mesh.stop())
            if isinstance(event, End):
                assert event.finish_reasons == {0: "length"}
        assert tokens == 100
        assert stopping is not None
        await stopping


async def test_two_hundred_cancelled_streams_leave_no_block_in_use() -> None:
    async with running(step=0.005) as rig:

        async def cancelled(number: int) -> None:
            stream = rig.stream(f"number {number}", cache="bypass", max_tokens=LONG)
            async with aclosing(stream):
                async for event in stream:
                    if isinstance(event, Text) and event.token_offset >= number % 7:
                        return

        await asyncio.gather(*(cancelled(number) for number in range(200)))
        await until(rig.idle)
        load = await rig.load()
        assert load.counters.cancelled == 200
        assert load.counters.blocks_freed_after_cancel >= 200


async def test_a_slow_reader_holds_back_its_own_stream_and_nobody_elses() -> None:
    async with running(step=0.002, interval=0.0) as rig:
        channel = open_channel(rig.mesh.target)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        chat = generation_pb2.Chat(messages=[generation_pb2.Message(role="user", content="slow")])
        sampling = generation_pb2.Sampling(temperature=0, max_tokens=1500, logprobs=20, n=4)
        generation = generation_pb2.Generation(input=generation_pb2.Input(chat=chat), sampling=sampling)
        slow = stub.StreamGenerate(
            inference_pb2.StreamGenerateRequest(generation=generation),
            metadata=[("authorization", f"Bearer {rig.mesh.key}")],
        )
        await slow.read()
        texts = await asyncio.gather(*(rig.text(f"quick {n}", cache="bypass", max_tokens=100) for n in range(4)))
        assert all(texts)
        await until(rig.idle)  # the engine has made it all, and most of it waits for its reader
        tokens = messages = 0
        while (response := await slow.read()).WhichOneof("event") != "end":
            tokens += response.chunk.token_count
            messages += 1
        assert tokens == 6000
        assert messages < 3000  # what was behind came in fewer, larger chunks
        await channel.close()


async def test_many_streams_share_messages_and_lose_no_token() -> None:
    async with running(step=0.01) as rig:

        async def messages(number: int) -> list[int]:
            stream = rig.stream(f"number {number}", cache="bypass", max_tokens=100)
            return [event.token_count async for event in stream if isinstance(event, Text)]

        alone = await messages(0)
        began = time.monotonic()
        crowd = await asyncio.gather(*(messages(number) for number in range(1, 17)))
        seconds = time.monotonic() - began
    assert sum(alone) == 100
    assert [sum(counts) for counts in crowd] == [100] * 16
    # One message in a tenth of a second, and in a quarter of that while few streams are there.
    assert max(map(len, crowd)) <= 40 * seconds + 5


async def test_a_kv_window_reaches_the_engine_and_its_answers_are_kept_apart() -> None:
    async with running() as rig:
        question = "long " * 100
        full = await rig.text(question)
        window = await rig.text(question, kv="window", kv_tokens=64)
        assert len(window) == len(full)
        assert window != full  # the fake's tokens depend on all that is still in its cache
        assert await rig.text(question, kv="window", kv_tokens=64) == window
        with pytest.raises(MeshError) as caught:
            await rig.text(question, kv="window", kv_tokens=1_000_000)
        assert caught.value.metadata["field"] == "generation.kv_policy.tokens"


async def test_limits_are_one_account_however_many_processes_ask() -> None:
    secret = "0" * 63 + "2"
    keys = f'[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "{_digest(secret)}"\nrequests_per_minute = 5\n'
    async with running(extra=keys, step=0.001) as rig:
        rig.client = AsyncMesh(rig.mesh.target, key=secret, deadline=DEADLINE)

        async def ready() -> bool:
            return any(m.ready_replicas for m in await rig.client.list_models())

        await until(ready)
        began = time.monotonic()
        results = await asyncio.gather(*(rig.text(f"n {n}", max_tokens=5) for n in range(12)), return_exceptions=True)
        back = (time.monotonic() - began) // 12  # one comes back each twelve seconds
        refused = [r for r in results if isinstance(r, BaseException)]
        assert {r.reason if isinstance(r, MeshError) else r for r in refused} == {Reason.RATE_LIMITED}
        assert all(isinstance(r, MeshError) and r.retry_after for r in refused)
        assert 7 - back <= len(refused) <= 7


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
