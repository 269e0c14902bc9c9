"""What a request is charged, whichever way it ends, and where a stream ends whose budget does.

A token costs one micro-unit and the day's counter has no rate: what it says is exact.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.accounts.ledger import SLICE
from meshlm.router.config import KeyConfig, PriceConfig
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure, text_of
from tests.router.mesh import key
from tests.waiting import until

BUDGET = 1000
DAY = "meshlm:{t}:key:k:micros_per_day"
STREAMS = "meshlm:{t}:key:k:concurrent_streams"


@pytest.fixture
def holder() -> KeyConfig:
    return key(micros_per_day=BUDGET, concurrent_streams=8)


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {"prices": {"m": PriceConfig(prompt=1_000_000, completion=1_000_000)}}


async def charged(state: Redis) -> int:
    return int(await state.get(DAY) or 0)


async def settled(state: Redis) -> bool:
    """Whether nothing is held any more."""
    records = [await state.get(name) async for name in state.scan_iter("meshlm:{t}:reservation:*")]
    return bool(records) and all(record == b"settled" for record in records)


async def ended(call: Any) -> tuple[list[Any], MeshError | None]:
    """All messages of a stream, and how it failed."""
    seen: list[Any] = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            seen.append(message)
    except grpc.RpcError as error:
        return seen, from_rpc_error(error)
    return seen, None


async def test_a_whole_answer_is_charged_what_its_end_says(mesh: Any, state: Redis) -> None:
    messages = await collect(mesh.stream())
    assert messages[-1].end.cost_micros == 10  # 7 of the prompt and 3
    assert messages[0].start.limits.day_micros_remaining == BUDGET - 17 - 10  # the estimate, and all of max_tokens
    assert messages[0].start.limits.streams_remaining == 7
    await until_settled(state)
    assert await charged(state) == 10


async def until_settled(state: Redis) -> None:
    async with asyncio.timeout(60):
        while not await settled(state):
            await asyncio.sleep(0.005)
    assert await state.zcard(STREAMS) == 0


async def test_an_answer_from_the_cache_costs_nothing(mesh: Any, state: Redis) -> None:
    await collect(mesh.stream())
    again = await collect(mesh.stream())
    assert again[-1].end.cost_micros == 0
    await until_settled(state)
    assert await charged(state) == 10


async def blocked(mesh: Any, **sampling: Any) -> MeshError:
    return await failure(mesh.stream("attack", sampling=sampling))


async def cancelled(mesh: Any, **sampling: Any) -> list[Any]:
    call = mesh.stream(sampling=sampling)
    seen = [await call.read(), await call.read()]
    call.cancel()
    return seen


async def too_late(mesh: Any, **sampling: Any) -> Any:
    return await ended(mesh.stream(timeout=4, sampling=sampling))


async def lost(mesh: Any, **sampling: Any) -> Any:
    for worker in mesh.workers:
        worker.failure = MeshError(Reason.ENGINE_LOST, "the engine died")
        worker.hold.set()
    return await ended(mesh.stream(sampling=sampling))


async def refused(mesh: Any, **sampling: Any) -> MeshError:
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.OVERLOADED, "full")
    return await failure(mesh.stream(sampling=sampling))


async def broken(mesh: Any, **sampling: Any) -> MeshError:
    """An exception nobody foresaw."""
    mesh.guards.open_output = None
    return await failure(mesh.stream(sampling=sampling))


async def filtered(mesh: Any, **sampling: Any) -> Any:
    for worker in mesh.workers:
        worker.pieces = ["The ", "code ", "is ", "secret", " stuff"]
        worker.hold.set()
    return await ended(mesh.stream(sampling=sampling))


@pytest.mark.parametrize(
    ("end", "tokens"),
    [(blocked, 0), (cancelled, 8), (too_late, 8), (lost, 8), (refused, 0), (broken, 0), (filtered, 10)],
)
async def test_every_ending_is_charged_what_went_out_and_nothing_else(
    mesh: Any, state: Redis, end: Callable[..., Awaitable[Any]], tokens: int
) -> None:
    """7 tokens of the prompt once the first message went out, and those of the answer that did."""
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    await end(mesh, max_tokens=400)
    await until_settled(state)
    assert await charged(state) == tokens


async def test_text_that_the_guard_holds_back_is_not_charged(mesh: Any, state: Redis) -> None:
    for worker in mesh.workers:
        worker.pieces = ["yes", "sss", "ss", " no"]
        worker.hold = asyncio.Event()
        worker.hold.set()
        worker.failure = None
    messages = await collect(mesh.stream())
    assert [m.usage.completion_tokens for m in messages] == [0, 1, 2, 3, 4, 4]  # each as it goes out
    await until_settled(state)


class TestSpent:
    @pytest.fixture(autouse=True)
    def long_answers(self, mesh: Any) -> None:
        for worker in mesh.workers:
            worker.pieces = ["x"] * 5000
            worker.stalls_at = 2000  # so that it cannot have ended by itself

    async def test_a_stream_ends_at_its_last_token_with_its_usage_and_the_worker_is_cancelled(
        self, mesh: Any, state: Redis
    ) -> None:
        with capture_logs() as lines:
            messages, error = await ended(mesh.stream(sampling={"max_tokens": 5000}))
            await until(lambda: any(line["event"] == "request" for line in lines))
        assert error is not None
        assert error.reason == Reason.BUDGET_SPENT
        assert error.status == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after is not None
        told = {name: error.metadata[name] for name in ("limit", "holder", "completion_tokens", "cost_micros")}
        assert told == {
            "limit": "micros_per_day", "holder": "key", "completion_tokens": str(BUDGET - 7), "cost_micros": str(BUDGET)
        }  # fmt: skip
        assert len(text_of(messages)) == BUDGET - 7
        assert messages[-2].chunk.finish_reason == pb.FINISH_REASON_BUDGET_SPENT
        assert messages[-2].chunk.token_offset == BUDGET - 7
        assert messages[-1].end.cost_micros == BUDGET
        assert messages[-1].usage.completion_tokens == BUDGET - 7
        worker = next(worker for worker in mesh.workers if worker.requests)
        await asyncio.wait_for(worker.cancelled.wait(), 60)
        await until_settled(state)
        assert await charged(state) == BUDGET
        (line,) = (line for line in lines if line["event"] == "request")
        assert (line["outcome"], line["limit"]) == (Reason.BUDGET_SPENT, "micros_per_day")
        assert (line["billed_tokens"], line["cost_micros"]) == (BUDGET, BUDGET)
        assert mesh.cache.calls == ["look_up", "release"]

    async def test_a_whole_answer_is_as_much_of_it_as_was_paid_for_and_says_so(self, mesh: Any, state: Redis) -> None:
        request = inference_pb2.GenerateRequest(generation=mesh.generation(sampling={"max_tokens": 5000}))
        with capture_logs() as lines:
            whole = await mesh.stub.Generate(request, metadata=mesh.metadata)
            await until(lambda: any(line["event"] == "request" for line in lines))
        (choice,) = whole.choices
        assert (choice.text, choice.finish_reason) == ("x" * (BUDGET - 7), pb.FINISH_REASON_BUDGET_SPENT)
        assert (whole.usage.completion_tokens, whole.end.cost_micros) == (BUDGET - 7, BUDGET)
        (line,) = (line for line in lines if line["event"] == "request")
        assert (line["outcome"], line["limit"]) == (Reason.BUDGET_SPENT, "micros_per_day")
        await until_settled(state)
        assert await charged(state) == BUDGET
        assert mesh.cache.calls == ["look_up", "release"]

    async def test_a_whole_answer_without_a_token_is_an_error(self, mesh: Any) -> None:
        self.in_messages_of(mesh, 2000)
        request = inference_pb2.GenerateRequest(generation=mesh.generation(sampling={"max_tokens": 5000}))
        with pytest.raises(grpc.RpcError) as caught:
            await mesh.stub.Generate(request, metadata=mesh.metadata)
        error = from_rpc_error(caught.value)
        assert (error.reason, error.metadata["completion_tokens"]) == (Reason.BUDGET_SPENT, "0")
        assert error.retry_after is not None

    async def test_text_that_went_out_before_it_was_judged_is_judged_though_the_budget_is_spent(
        self, mesh: Any, state: Redis
    ) -> None:
        mesh.guard.ahead = True
        for worker in mesh.workers:
            worker.pieces[BUDGET - 8] = "secret"
        request = inference_pb2.GenerateRequest(generation=mesh.generation(sampling={"max_tokens": 5000}))
        whole = await mesh.stub.Generate(request, metadata=mesh.metadata)
        (choice,) = whole.choices
        assert (choice.text, choice.finish_reason) == ("x" * (BUDGET - 8), pb.FINISH_REASON_CONTENT_FILTER)
        assert list(whole.end.output_verdicts[0].categories) == ["secret.word"]
        await until_settled(state)
        assert await charged(state) == BUDGET

    async def test_the_next_request_is_refused_at_the_door_with_the_time_to_wait(self, mesh: Any) -> None:
        await ended(mesh.stream(sampling={"max_tokens": 5000}))
        error = await failure(mesh.stream("another"))
        assert (error.reason, error.metadata["limit"]) == (Reason.BUDGET_SPENT, "micros_per_day")
        assert 0 < (error.retry_after or 0) <= 86_400

    async def test_a_message_that_would_pass_the_limit_does_not_go_out(self, mesh: Any, state: Redis) -> None:
        self.in_messages_of(mesh, 30)
        messages, error = await ended(mesh.stream(sampling={"max_tokens": 5000}))
        assert error is not None
        assert error.reason == Reason.BUDGET_SPENT
        assert messages[-1].usage.completion_tokens == 990  # 33 messages: 997 were paid for
        await until_settled(state)
        assert await charged(state) == 997

    async def test_a_prompt_above_its_estimate_is_not_followed_by_more_than_is_left(
        self, mesh: Any, state: Redis
    ) -> None:
        """17 were estimated, 7 counted; here 900 are: not a token more than 100 may follow."""
        for worker in mesh.workers:
            worker.prompt_tokens = 900
        messages, error = await ended(mesh.stream(sampling={"max_tokens": 5000}))
        assert error is not None
        assert messages[-1].usage.completion_tokens == 100
        await until_settled(state)
        assert await charged(state) == BUDGET

    async def test_a_limit_is_asked_once_a_slice_and_the_stream_does_not_wait(self, mesh: Any, state: Redis) -> None:
        mesh.rekey((dataclasses.replace(mesh.config.keys[0], micros_per_day=1_000_000),))
        for worker in mesh.workers:
            worker.pieces = ["x"] * 1000
        extend, asked, answer = mesh.ledger.extend, [], asyncio.Event()

        async def slow(reservation: Any, usage: Any, wanted: int) -> Any:
            asked.append((usage.completion, wanted))
            await answer.wait()
            return await extend(reservation, usage, wanted)

        mesh.ledger.extend = slow
        call = mesh.stream(sampling={"max_tokens": 1000})
        seen = [await call.read() for _ in range(1 + SLICE)]  # all that is paid for, while the question is open
        assert seen[-1].usage.completion_tokens == SLICE
        assert asked == [(SLICE, 2 * SLICE)]
        answer.set()
        messages, error = await ended(call)
        assert error is None
        assert asked == [(SLICE, 2 * SLICE), (2 * SLICE, 3 * SLICE), (3 * SLICE, 1000)]
        assert messages[-1].usage.completion_tokens == 1000
        await until_settled(state)
        assert await charged(state) == 1007

    @staticmethod
    def in_messages_of(mesh: Any, tokens: int) -> None:
        for worker in mesh.workers:
            worker.tokens_each = tokens
