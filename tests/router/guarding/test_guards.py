"""What the guard says of inputs and answers, and what follows where it says nothing, through the real router."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.router.config import TenantConfig
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure, text_of
from tests.waiting import until


async def test_nothing_leaves_before_the_verdict_though_the_worker_has_begun(mesh: Any) -> None:
    mesh.guard.hold = asyncio.Event()
    call = mesh.stream()
    reading = asyncio.ensure_future(call.read())
    await until(lambda: any(worker.requests for worker in mesh.workers))
    assert not reading.done()
    mesh.guard.hold.set()
    assert (await reading).HasField("start")
    assert text_of(await collect(call)) == "Hello big world"


async def test_a_blocked_input_stops_the_worker_and_names_its_categories(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    mesh.guard.hold = asyncio.Event()
    call = asyncio.ensure_future(failure(mesh.stream("attack")))
    await until(lambda: any(worker.requests for worker in mesh.workers))
    mesh.guard.hold.set()
    error = await call
    assert error.reason == Reason.INJECTION_SUSPECTED
    assert error.metadata["categories"] == "injection.override"
    worker = next(worker for worker in mesh.workers if worker.requests)
    await asyncio.wait_for(worker.cancelled.wait(), 60)
    assert mesh.cache.calls == ["look_up", "release"]


@pytest.mark.parametrize("policy", ["refuse", "allow"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_guard_that_fails_is_treated_as_the_key_says(mesh: Any, policy: str, late: bool) -> None:
    changed = dataclasses.replace(mesh.config.keys[0], guard_failure=policy)
    mesh.rekey((changed,))
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    mesh.guard.down = not late
    call = mesh.stream()
    reading = asyncio.ensure_future(failure(call) if policy == "refuse" else collect(call))
    if late:
        await until(lambda: any(worker.requests for worker in mesh.workers) and mesh.guard.inputs)
        mesh.guard.down = True
    for worker in mesh.workers:
        worker.hold.set()
    result = await reading
    if policy == "refuse":
        assert result.reason == Reason.GUARD_UNAVAILABLE
    else:
        assert text_of(result) == "Hello big world"


@pytest.mark.parametrize("policy", ["refuse", "allow"])
@pytest.mark.parametrize(("field", "reason"), [("input", Reason.REQUEST_INVALID), ("policy", Reason.GUARD_UNAVAILABLE)])
async def test_what_the_guard_will_not_judge_passes_under_no_policy(
    mesh: Any, policy: str, field: str, reason: Reason
) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure=policy),))
    mesh.guard.declines = invalid(field, "not this one")
    error = await failure(mesh.stream())
    assert error.reason == reason
    assert error.retry_after is None


async def test_a_guard_that_refuses_by_its_own_policy_is_not_overruled_by_a_lenient_key(mesh: Any) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure="allow"),))
    mesh.guard.declines = MeshError(Reason.GUARD_UNAVAILABLE, "no model")
    assert (await failure(mesh.stream())).reason == Reason.GUARD_UNAVAILABLE


class TestGuardsBreaker:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"guard_retry_seconds": 600.0}

    async def test_a_guard_that_is_down_is_not_asked_each_time(self, mesh: Any) -> None:
        mesh.guard.down = True
        for number in range(6):
            assert (await failure(mesh.stream(f"hi {number}"))).reason == Reason.GUARD_UNAVAILABLE
        assert len(mesh.guard.inputs) == 3  # then the breaker is open
        mesh.guard.down = False
        mesh.guards.breaker._until = 0.0
        assert text_of(await collect(mesh.stream("again"))) == "Hello big world"
        assert not mesh.guards.breaker.open


class TestTenantsPolicy:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"tenants": {"t": TenantConfig(guard_policy="careful")}}

    async def test_a_key_that_names_no_policy_is_under_its_tenants(self, mesh: Any) -> None:
        await collect(mesh.stream())
        assert mesh.guard.inputs[0].policy == "careful"
        assert mesh.guard.starts[0].policy == "careful"
        assert mesh.cache.lookups[0].policy == "careful"
        mesh.rekey((dataclasses.replace(mesh.config.callers[0], guard_policy="own"),))
        await collect(mesh.stream("again"))
        assert mesh.guard.inputs[1].policy == "own"


async def test_an_input_that_a_policy_may_change_is_seen_by_nobody_before_the_guard(mesh: Any) -> None:
    mesh.guard.redacts = True
    mesh.guards._redacting[""] = True
    mesh.guard.hold = asyncio.Event()
    call = mesh.stream("my private number")
    reading = asyncio.ensure_future(call.read())
    await until(lambda: mesh.guard.inputs)
    assert not any(worker.requests for worker in mesh.workers)
    assert mesh.cache.calls == []
    mesh.guard.hold.set()
    assert (await reading).start.input_verdict.action == pb.Verdict.ACTION_REDACT
    await collect(call)
    sent = [request for worker in mesh.workers for request in worker.requests]
    assert [r.generation.input.chat.messages[0].content for r in sent] == ["my [pii] number"]
    assert mesh.cache.lookups[0].generation.input.chat.messages[0].content == "my [pii] number"


async def test_a_policy_that_begins_to_change_inputs_fails_the_one_request_that_was_ahead_of_it(mesh: Any) -> None:
    mesh.guard.redacts = True
    error = await failure(mesh.stream("my private number"))
    assert error.reason == Reason.GUARD_UNAVAILABLE
    assert text_of(await collect(mesh.stream("my private number"))) == "Hello big world"


async def test_a_blocked_answer_ends_as_content_filter_before_the_blocked_text(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.pieces = ["The ", "code is ", "s", "ecret", " stuff"]
        worker.hold = asyncio.Event()
        worker.hold.set()
    responses = await collect(mesh.stream())
    assert text_of(responses) == "The code is "
    assert responses[-2].chunk.finish_reason == pb.FINISH_REASON_CONTENT_FILTER
    assert responses[-2].chunk.token_offset == 2
    assert list(responses[-1].end.output_verdicts[0].categories) == ["secret.word"]
    assert mesh.cache.calls == ["look_up", "release"]


async def test_a_resumed_answer_is_judged_with_what_went_before_it(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.skipped, worker.pieces = "the s", ["ecret", " is out"]
    responses = await collect(mesh.stream(resume_from=2))
    assert text_of(responses) == ""
    assert responses[-2].chunk.finish_reason == pb.FINISH_REASON_CONTENT_FILTER


async def test_held_text_goes_out_once_the_guard_releases_it(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.pieces = ["yes", "terday", "s"]
    responses = await collect(mesh.stream())
    assert [r.chunk.text for r in responses[1:-1]] == ["yes", "terday", "s"]


async def test_generate_is_guarded_like_a_stream(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.pieces = ["The ", "code is ", "s", "ecret", " stuff"]
    request = inference_pb2.GenerateRequest(generation=mesh.generation())
    response = await mesh.stub.Generate(request, metadata=mesh.metadata)
    assert response.choices[0].text == "The code is "
    assert response.choices[0].finish_reason == pb.FINISH_REASON_CONTENT_FILTER
    assert list(response.end.output_verdicts[0].categories) == ["secret.word"]


async def test_a_stop_is_told_in_a_message_of_its_own_with_its_place(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.pieces = ["The ", "code is ", "secret", " stuff"]
    responses = await collect(mesh.stream())
    (told,) = [r.moderation for r in responses if r.HasField("moderation")]
    assert told.action == inference_pb2.Moderation.ACTION_STOP
    assert (told.char_start, list(told.categories)) == (12, ["secret.word"])
    assert all(r.usage.prompt_tokens for r in responses)


async def test_what_a_stream_takes_back_is_not_in_a_whole_answer(mesh: Any) -> None:
    mesh.guard.fast = True
    for worker in mesh.workers:
        worker.pieces = ["The code is ", "secret", " stuff", " and more"]
    responses = await collect(mesh.stream())
    assert text_of(responses) == "The code is secret"
    (told,) = [r.moderation for r in responses if r.HasField("moderation")]
    assert told.action == inference_pb2.Moderation.ACTION_RETRACT
    assert (told.char_start, told.char_end) == (12, 18)
    whole = await mesh.stub.Generate(
        inference_pb2.GenerateRequest(generation=mesh.generation()), metadata=mesh.metadata
    )
    assert whole.choices[0].text == "The code is "
    assert mesh.cache.calls[-1] == "release"
