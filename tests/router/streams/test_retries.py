"""The retry budget, by hand and by property; and a router that keeps to it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.streams.config import StreamsConfig
from meshlm.router.streams.retries import RetryBudget
from meshlm.v1 import generation_pb2 as pb
from tests.router.calls import collect, failure, text_of


def test_a_tenth_of_requests_may_be_retried_and_no_more() -> None:
    budget = RetryBudget(0.1, 0.0, clock=lambda: 0.0)
    taken = 0
    for _ in range(1000):
        budget.note_request()
        taken += budget.take("lost")
    assert 99 <= taken <= 100


def test_a_quiet_router_has_retries_for_the_loss_of_one_worker() -> None:
    now = 0.0
    budget = RetryBudget(0.1, 10.0, clock=lambda: now)
    assert sum(budget.take("lost") for _ in range(1000)) == 100
    now = 1.0
    assert sum(budget.take("lost") for _ in range(1000)) == 10


@given(
    st.floats(0, 1),
    st.floats(0, 50),
    st.lists(st.one_of(st.just("request"), st.just("take"), st.floats(0, 5)), max_size=200),
)
def test_retries_never_exceed_share_time_and_what_was_saved(share: float, rate: float, events: list[Any]) -> None:
    now, requests, taken = 0.0, 0, 0
    budget = RetryBudget(share, rate, clock=lambda: now)
    for event in events:
        if event == "request":
            requests += 1
            budget.note_request()
        elif event == "take":
            taken += budget.take("lost")
        else:
            now += event
    assert taken <= share * requests + rate * (now + 10) + 1e-6


class TestWithoutBudget:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"streams": StreamsConfig(retry_share=0.0, retries_per_second=0.0, resume_wait_seconds=0.0)}

    async def test_a_refusal_is_the_answer(self, mesh: Any) -> None:
        for worker in mesh.workers:
            worker.refusal = MeshError(Reason.OVERLOADED, "full")
        assert (await failure(mesh.stream())).reason == Reason.OVERLOADED
        assert sum(len(worker.requests) for worker in mesh.workers) == 1

    async def test_a_stream_under_way_goes_on_all_the_same(self, mesh: Any) -> None:
        for worker in mesh.workers:
            worker.failures = [MeshError(Reason.ENGINE_LOST, "the engine died")]
        mesh.workers[1].failures = []
        mesh.workers[1].load.running = 5  # so that the other one is first
        mesh.workers[1].changed.set()
        while mesh.fleet.replicas[1].state.running != 5:
            await asyncio.sleep(0.005)
        responses = await collect(mesh.stream())
        assert text_of(responses) == "Hello big world"
        assert list(responses[-1].end.replicas) == ["w0", "w1"]
        assert list(mesh.workers[1].requests[0].generated) == [0]
        assert mesh.workers[1].requests[0].resume_from == 1


async def test_a_stream_asks_for_token_ids_and_does_not_send_them_on(mesh: Any) -> None:
    responses = await collect(mesh.stream())
    assert not any(response.chunk.token_ids for response in responses)
    responses = await collect(mesh.stream("other", return_token_ids=True))
    assert [list(r.chunk.token_ids) for r in responses[1:-1]] == [[0], [1], [2]]
    requests = [request for worker in mesh.workers for request in worker.requests]
    assert all(request.generation.return_token_ids for request in requests)


async def test_a_drawn_answer_has_a_seed_that_is_told_and_is_no_part_of_the_cache_key(mesh: Any) -> None:
    sampling = {"temperature": 1.0}
    first = await collect(mesh.stream(sampling=sampling, cache_policy=pb.CACHE_POLICY_ALWAYS))
    second = await collect(mesh.stream(sampling=sampling, cache_policy=pb.CACHE_POLICY_ALWAYS))
    asked = next(request for worker in mesh.workers for request in worker.requests)
    assert first[0].start.seed == asked.generation.sampling.seed
    assert second[0].start.routing.reason == "cache_hit"
    assert not second[0].start.HasField("seed")
    assert not (await collect(mesh.stream("greedy")))[0].start.HasField("seed")


async def test_a_worker_that_goes_on_from_another_token_is_not_believed(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.shift = 1
    with pytest.raises(grpc.RpcError) as caught:
        await collect(mesh.stream())
    assert from_rpc_error(caught.value).reason == Reason.INTERNAL
