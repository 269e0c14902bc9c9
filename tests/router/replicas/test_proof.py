"""Distances by property, the shared list on a real Valkey, and votes by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.router.replicas.proof import distance
from meshlm.router.replicas.proof_config import ProofConfig
from meshlm.router.replicas.quarantine import Register
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from tests.router.calls import collect
from tests.waiting import until

numbers = st.lists(st.floats(-50, 0), min_size=1, max_size=30)


@given(numbers, st.floats(0, 5))
def test_a_distance_is_what_each_token_differs_by(logprobs: list[float], by: float) -> None:
    assert distance(logprobs, [value - by for value in logprobs]) == pytest.approx(by, abs=1e-9)
    assert distance(logprobs, logprobs) == 0


@pytest.mark.parametrize("other", [[], [-1.0], [-1.0, math.nan], [-1.0, -math.inf]])
def test_nonsense_is_infinitely_far(other: list[float]) -> None:
    assert distance([-1.0, -2.0], other) == math.inf


async def test_the_list_is_shared_ends_by_itself_and_by_release(state: Redis) -> None:
    one, two = Register(state), Register(state)
    await one.add("a", 60.0, "why a")
    assert (await two.add("b", 0.05, "why b")).keys() == {"a", "b"}
    left, why = (await two.read())["a"]
    assert (50 < left <= 60, why) == (True, "why a")
    async with asyncio.timeout(60):
        while (await two.read()).keys() != {"a"}:
            await asyncio.sleep(0.005)
    assert await two.release("a") == {}
    assert await one.read() == {}
    assert await state.keys("*") == []


class TestVotes:
    """With two workers; tests/mesh/test_proof.py has three."""

    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"proof": ProofConfig(share=1.0, least_tokens=1)}

    @pytest.fixture(autouse=True)
    def said(self, mesh: Any) -> dict[str, float]:
        """What each worker says of every token when asked to compute an answer again; with the answers it is -1."""
        said = {"w0": -1.0, "w1": -1.0}
        self.asked: list[worker_pb2.ScoreRequest] = []

        def scores(name: str) -> Any:
            async def score(request: worker_pb2.ScoreRequest) -> worker_pb2.ScoreResponse:
                self.asked.append(request)
                return worker_pb2.ScoreResponse(scored=[worker_pb2.ScoredText(logprobs=[said[name]] * 3)])

            return score

        for worker in mesh.workers:
            worker.logprob, worker.scores = -1.0, scores(worker.load.replica)
        return said

    async def served_by(self, mesh: Any) -> str:
        responses = await collect(mesh.stream(cache_policy=pb.CACHE_POLICY_BYPASS))
        assert not any(response.chunk.logprobs for response in responses)
        await until(lambda: not mesh.prover._running)
        return str(responses[0].start.routing.replica)

    async def test_a_verifier_reads_the_input_as_the_worker_read_it(self, mesh: Any) -> None:
        page = pb.Message(role="user", parts=[pb.Part(text="a page of others", untrusted=True)])
        source = pb.Input(chat=pb.Chat(messages=[page]))
        await collect(mesh.stream(input=source, cache_policy=pb.CACHE_POLICY_BYPASS))
        await until(lambda: self.asked)
        (read,) = [request.generation.input for worker in mesh.workers for request in worker.requests]
        assert [asked.input for asked in self.asked] == [read]
        assert read != source

    async def test_agreement_changes_nothing(self, mesh: Any) -> None:
        await self.served_by(mesh)
        (request,) = self.asked
        assert list(request.continuations[0].token_ids.ids) == [0, 1, 2]
        assert all(replica.usable for replica in mesh.fleet.replicas)

    async def test_a_worker_that_does_not_say_the_same_again_is_wrong(self, mesh: Any, said: dict[str, float]) -> None:
        said.update(w0=-3.0, w1=-3.0)  # both differ from what was said with the answer
        served = await self.served_by(mesh)
        assert [replica.name for replica in mesh.fleet.replicas if replica.quarantined] == [served]
        other = await self.served_by(mesh)
        assert other != served

    async def test_of_two_that_stand_by_what_they_say_nobody_is_wrong(self, mesh: Any, said: dict[str, float]) -> None:
        mesh.workers[1].load.running = 9
        mesh.workers[1].changed.set()
        await until(lambda: mesh.fleet.replicas[1].state.running == 9)
        said["w1"] = -3.0
        assert await self.served_by(mesh) == "w0"
        assert all(replica.usable for replica in mesh.fleet.replicas)

    async def test_workers_of_other_formats_prove_nothing(self, mesh: Any, said: dict[str, float]) -> None:
        mesh.workers[1].load.model.quantization = "int4"
        mesh.workers[1].changed.set()
        await until(lambda: mesh.fleet.replicas[1].state.model.quantization == "int4")
        said.update(w0=-3.0, w1=-3.0)
        await self.served_by(mesh)
        assert all(replica.usable for replica in mesh.fleet.replicas)
