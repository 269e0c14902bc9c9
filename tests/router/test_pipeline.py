"""The way of a request through the real router, amid fake peers over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error, invalid
from meshlm.router.config import KeyConfig, TenantConfig
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2


async def collect(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def text_of(responses: list[Any]) -> str:
    return "".join(response.chunk.text for response in responses)


async def failure(call: Any) -> MeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await collect(call)
    return from_rpc_error(caught.value)


async def tokens_charged(state: Redis, per_minute: int = 300) -> float:
    """Tokens that the key's limit of so many a minute holds against it now."""
    value = await state.get("meshlm:{t}:key:k:tokens_per_minute")
    seconds, micros = await state.time()
    return max(0.0, int(value or 0) - seconds * 1_000_000 - micros) * per_minute / 60_000_000


async def until(condition: Any, bound: float = 60.0) -> None:
    async with asyncio.timeout(bound):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_stream_starts_with_its_decision_and_ends_with_its_timing(mesh: Any) -> None:
    first, *middle, last = await collect(mesh.stream())
    assert first.start.routing.model == "m"
    assert first.start.routing.model_revision == "r1"
    assert set(first.start.routing.candidates) == {"w0", "w1"}
    assert first.start.input_verdict.policy_version == "p1"
    assert text_of(middle) == "Hello big world"
    assert [m.chunk.token_offset for m in middle] == [0, 1, 2]
    assert middle[-1].chunk.finish_reason == pb.FINISH_REASON_STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 3)
    assert 0 < last.end.timing.time_to_first_token <= last.end.timing.total
    assert (last.end.timing.queue, last.end.timing.prefill, last.end.timing.decode) == (0.5, 1.5, 2.5)
    assert not any(worker.cancelled.is_set() for worker in mesh.workers)


async def test_generate_gives_the_same_answer_whole(mesh: Any) -> None:
    request = inference_pb2.GenerateRequest(generation=mesh.generation())
    response = await mesh.stub.Generate(request, metadata=mesh.metadata)
    assert [(c.index, c.text, c.finish_reason) for c in response.choices] == [
        (0, "Hello big world", pb.FINISH_REASON_STOP)
    ]
    assert response.usage.completion_tokens == 3


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


async def test_an_answer_made_under_another_policy_is_made_anew(mesh: Any) -> None:
    await collect(mesh.stream())
    mesh.guard.policy = "p2"
    second = await collect(mesh.stream())
    assert second[0].start.routing.reason != "cache_hit"
    assert mesh.cache.calls == ["look_up", "store", "look_up", "look_up_refresh", "store"]
    assert (await collect(mesh.stream()))[0].start.routing.reason == "cache_hit"


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


class TestHangingCache:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"cache_seconds": 0.5}

    async def test_it_is_a_miss(self, mesh: Any) -> None:
        mesh.cache.hold = asyncio.Event()
        assert text_of(await collect(mesh.stream())) == "Hello big world"


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


async def test_a_cache_that_fails_is_a_miss(mesh: Any) -> None:
    mesh.cache.down = True
    assert text_of(await collect(mesh.stream())) == "Hello big world"


async def test_a_refusing_replica_passes_the_request_to_the_next(mesh: Any) -> None:
    mesh.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    for number in range(4):
        responses = await collect(mesh.stream(f"hi {number}"))
        assert responses[0].start.routing.replica == "w1"
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.OVERLOADED, "full", retry_after=2)
    error = await failure(mesh.stream("again"))
    assert (error.reason, error.retry_after) == (Reason.OVERLOADED, 2)


@pytest.mark.parametrize("router_config", [{"guard": "", "cache": "", "overload": OverloadConfig(queue_seconds=0.05)}])
async def test_a_request_that_waits_in_vain_is_recorded_with_the_model_it_waited_for(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.load.waiting_limit = worker.load.waiting = 1
        worker.changed.set()
    async with asyncio.timeout(60):
        while any(replica.has_room(1.0) for replica in mesh.fleet.replicas):
            await asyncio.sleep(0.005)
    with capture_logs() as lines:
        error = await failure(mesh.stream())
    assert (error.reason, error.metadata["cause"]) == (Reason.OVERLOADED, "waited")
    assert [line["model"] for line in lines if line["event"] == "request"] == ["m"]


async def test_a_request_at_fault_is_not_tried_elsewhere(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.CONTEXT_TOO_LONG, "too long")
    assert (await failure(mesh.stream())).reason == Reason.CONTEXT_TOO_LONG
    assert sum(len(worker.requests) for worker in mesh.workers) == 1


async def test_the_less_loaded_replica_gets_the_request(mesh: Any) -> None:
    mesh.workers[0].load.running = 3
    mesh.workers[0].changed.set()
    await until(lambda: mesh.fleet.replicas[0].state.running == 3)
    for number in range(3):
        responses = await collect(mesh.stream(f"hi {number}"))
        assert responses[0].start.routing.replica == "w1"


async def test_a_draining_replica_gets_none(mesh: Any) -> None:
    mesh.workers[0].load.draining = True
    mesh.workers[0].changed.set()
    await until(lambda: mesh.fleet.replicas[0].state.draining)
    assert list((await collect(mesh.stream()))[0].start.routing.candidates) == ["w1"]


async def test_a_worker_that_falls_silent_is_not_sent_anything(mesh: Any) -> None:
    fleet = Fleet(mesh.config.workers, silence_seconds=0.2)
    fleet.start()
    await until(lambda: all(replica.usable for replica in fleet.replicas))
    mesh.workers[0].mute = True
    await mesh.workers[0].unheard.wait()  # what the last one may have told it before is on its way no more
    await until(lambda: not fleet.replicas[0].usable)
    with contextlib.suppress(TimeoutError):  # its connection stands, and it says nothing: it must not come back
        await until(lambda: fleet.replicas[0].usable, bound=1.0)
    assert not fleet.replicas[0].usable
    mesh.workers[0].mute = False
    await until(lambda: fleet.replicas[0].usable)
    await fleet.stop()


@pytest.mark.parametrize("why", ["silent", "loading"])
async def test_a_router_answers_nobody_before_its_workers_are_ready(mesh: Any, why: str) -> None:
    mesh.workers[1].mute, mesh.workers[1].load.ready = why == "silent", why != "loading"
    young = Fleet(mesh.config.workers)
    mesh.servicer._fleet = young
    young.start()
    call = mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=mesh.metadata)
    await until(lambda: young.replicas[0].usable)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(young.introduced(), 0.3)
    assert not call.done()
    mesh.workers[1].mute, mesh.workers[1].load.ready = False, True
    mesh.workers[1].changed.set()
    assert {model.name: model.ready_replicas for model in (await call).models} == {"alias": 2, "m": 2}
    await young.stop()


async def test_a_worker_that_is_never_heard_holds_a_router_up_only_for_a_while(mesh: Any) -> None:
    fleet = Fleet([*mesh.config.workers, "unix:/nowhere"], ReplicaConfig(hear_seconds=0.2))
    fleet.start()
    await asyncio.wait_for(fleet.introduced(), 60)
    await until(lambda: all(replica.usable for replica in fleet.replicas[:2]))
    await fleet.stop()


async def test_a_fault_in_mid_stream_tells_what_was_used(mesh: Any) -> None:
    for worker in mesh.workers:
        worker.failure = MeshError(Reason.ENGINE_LOST, "the engine died")
    call, seen = mesh.stream(), []
    with pytest.raises(grpc.RpcError) as caught:
        while True:
            seen.append(await call.read())
    assert from_rpc_error(caught.value).reason == Reason.ENGINE_LOST
    assert text_of(seen) == "Hello"
    assert seen[-1].usage.completion_tokens == 1
    assert mesh.cache.calls == ["look_up", "release"]


@pytest.fixture
def holder() -> KeyConfig:
    return KeyConfig(id="k", secret_hash=hashlib.sha256(b"a-key").hexdigest(), tenant="t", tokens_per_minute=300)


async def test_every_ending_leaves_the_ledger_with_what_was_used(mesh: Any, state: Redis) -> None:
    """7 prompt tokens and 3 of answer are 10; reserved were some 20 more. Time gives back one a second."""
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], tokens_per_minute=60),))
    await collect(mesh.stream("one"))
    assert 0 < await tokens_charged(state, 60) <= 10
    before = await tokens_charged(state, 60)
    await collect(mesh.stream("one"))  # from the cache: free
    assert await tokens_charged(state, 60) <= before
    await state.flushdb()
    await failure(mesh.stream("attack"))
    assert await tokens_charged(state, 60) <= 10
    for worker in mesh.workers:
        worker.refusal = MeshError(Reason.OVERLOADED, "full")
    await state.flushdb()
    await failure(mesh.stream("two"))
    assert await tokens_charged(state) == 0


async def test_a_cancelled_stream_is_cancelled_at_the_worker_and_settled(mesh: Any, state: Redis) -> None:
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    call = mesh.stream(sampling={"max_tokens": 5_000})
    await call.read()
    await call.read()
    assert await tokens_charged(state) > 200  # the prompt's estimate, and a slice of 256
    call.cancel()
    worker = next(worker for worker in mesh.workers if worker.requests)
    await asyncio.wait_for(worker.cancelled.wait(), 60)
    async with asyncio.timeout(60):
        while await tokens_charged(state) > 10:
            await asyncio.sleep(0.005)
    await until(lambda: mesh.cache.calls[-1] == "release")


async def test_a_passed_deadline_reaches_the_worker_and_is_settled(mesh: Any, state: Redis) -> None:
    for worker in mesh.workers:
        worker.hold = asyncio.Event()
    with capture_logs() as lines:
        error = await failure(mesh.stream(timeout=4, sampling={"max_tokens": 5_000}))
        assert error.reason == Reason.DEADLINE
        worker = next(worker for worker in mesh.workers if worker.requests)
        await asyncio.wait_for(worker.cancelled.wait(), 60)
        async with asyncio.timeout(60):
            while await tokens_charged(state) > 10:
                await asyncio.sleep(0.005)
        await until(lambda: any(line["event"] == "request" for line in lines))
    assert [line["outcome"] for line in lines if line["event"] == "request"] == [Reason.DEADLINE]


class TestDefaultDeadline:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"default_deadline_seconds": 0.3}

    @pytest.mark.parametrize("part", ["guard", "cache"])
    async def test_it_bounds_the_guard_and_the_cache_too(self, mesh: Any, part: str) -> None:
        getattr(mesh, part).hold = asyncio.Event()
        mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure="allow"),))
        async with asyncio.timeout(60):
            assert (await failure(mesh.stream())).reason == Reason.DEADLINE


async def test_a_request_cancelled_while_it_reserves_gives_all_of_it_back(mesh: Any, state: Redis) -> None:
    reserve, reserved, answered = mesh.ledger.reserve, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        reservation = await reserve(*arguments)
        reserved.set()
        await answered.wait()
        return reservation

    mesh.ledger.reserve = slow
    request = inference_pb2.StreamGenerateRequest(generation=mesh.generation(sampling={"max_tokens": 5_000}))
    work = Work.begin(request, mesh.config.keys[0], ("id", "0" * 32), None, mesh.config)
    running = asyncio.ensure_future(anext(mesh.pipeline.run(work)))
    await reserved.wait()
    assert await tokens_charged(state) > 200  # the prompt's estimate, and a slice of 256
    running.cancel()
    await asyncio.wait({running}, timeout=0.05)
    answered.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await mesh.pipeline.stop()
    assert await tokens_charged(state) == 0


@pytest.mark.parametrize("header", ["Bearer wrong", "a-key", "Basic a-key", ""])
async def test_a_call_without_a_known_key_is_refused_on_every_rpc(mesh: Any, header: str) -> None:
    metadata = [("authorization", header)]
    for call in (
        mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata),
        mesh.stub.CountTokens(inference_pb2.CountTokensRequest(), metadata=metadata),
        mesh.stub.Generate(inference_pb2.GenerateRequest(), metadata=metadata),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert from_rpc_error(caught.value).reason == Reason.KEY_INVALID
    mesh.metadata = metadata
    assert (await failure(mesh.stream())).reason == Reason.KEY_INVALID


async def test_token_ids_need_the_right_and_are_judged_by_their_text(mesh: Any) -> None:
    source = pb.Input(token_ids=pb.TokenIds(ids=[1, 2]))
    assert (await failure(mesh.stream(input=source))).reason == Reason.KEY_NOT_ALLOWED
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], raw_prompts=True),))
    assert text_of(await collect(mesh.stream(input=source))) == "Hello big world"
    assert mesh.guard.inputs[-1].token_text == "decoded"


async def test_answers_to_prompts_with_control_tokens_are_asked_for_as_such(mesh: Any) -> None:
    source = pb.Input(prompt="<|im_start|>")
    await collect(mesh.stream(input=source))
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], raw_prompts=True),))
    await collect(mesh.stream(input=source))
    assert [lookup.allow_control_tokens for lookup in mesh.cache.lookups] == [False, True]


async def test_a_limit_that_a_key_has_not_is_not_told_as_spent(mesh: Any) -> None:
    limits = (await collect(mesh.stream()))[0].start.limits
    assert not limits.HasField("requests_remaining")
    assert 0 < limits.tokens_remaining < 300


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": {"temperature": 3.0}}, "generation.sampling.temperature"),
        ({"kv_policy": {"mode": "MODE_WINDOW", "tokens": 63}}, "generation.kv_policy.tokens"),
        ({"sampling": {"top_p": 0.0}}, "generation.sampling.top_p"),
        ({"sampling": {"n": 9}}, "generation.sampling.n"),
        ({"sampling": {"stop": [""]}}, "generation.sampling.stop"),
        ({"sampling": {"max_tokens": 5, "min_tokens": 6}}, "generation.sampling.min_tokens"),
        ({"sampling": {"logit_bias": {1: float("nan")}}}, "generation.sampling.logit_bias"),
        ({"session": "x" * 129}, "generation.session"),
        ({"priority": 9}, "generation.priority"),
        ({"cache_policy": -1}, "generation.cache_policy"),
        ({"adapter": "a"}, "generation.adapter"),
        ({"input": pb.Input()}, "generation.input"),
        (
            {"input": pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content="x", name="a b")]))},
            "generation.input.chat.messages[0].name",
        ),
        ({"input": pb.Input(prompt="")}, "generation.input.prompt"),
        ({"sampling": {"temperature": 1.0}, "resume_from": 3}, "resume_from"),
        ({"sampling": {"n": 2}, "resume_from": 3}, "resume_from"),
    ],
)
async def test_a_bad_field_is_named(mesh: Any, fields: dict[str, Any], path: str) -> None:
    error = await failure(mesh.stream(**fields))
    assert error.reason == Reason.REQUEST_INVALID
    assert error.metadata["field"] == path


async def test_an_input_that_is_too_large_is_neither_answered_nor_counted(mesh: Any) -> None:
    source = pb.Input(prompt="x" * (mesh.config.max_input_bytes + 1))
    assert (await failure(mesh.stream(input=source))).metadata["field"] == "generation.input"
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.stub.CountTokens(inference_pb2.CountTokensRequest(input=source), metadata=mesh.metadata)
    assert from_rpc_error(caught.value).metadata["field"] == "input"


async def test_an_unknown_model_is_told_and_an_alias_is_resolved(mesh: Any) -> None:
    assert (await failure(mesh.stream(model="none"))).reason == Reason.MODEL_UNKNOWN
    assert (await collect(mesh.stream(model="alias")))[0].start.routing.model == "m"
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], models=("other",)),))
    assert (await failure(mesh.stream(model="m"))).reason == Reason.KEY_NOT_ALLOWED


@pytest.mark.parametrize(
    ("right", "asked", "given"),
    [
        ("interactive", pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_INTERACTIVE),
        ("interactive", pb.PRIORITY_BATCH, pb.PRIORITY_BATCH),
        ("batch", pb.PRIORITY_CRITICAL, pb.PRIORITY_BATCH),
        ("critical", pb.PRIORITY_CRITICAL, pb.PRIORITY_CRITICAL),
    ],
)
async def test_no_request_is_more_urgent_than_its_key_allows(mesh: Any, right: str, asked: int, given: int) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], priority=right),))
    await collect(mesh.stream(priority=asked))
    assert [request.generation.priority for worker in mesh.workers for request in worker.requests] == [given]


async def test_prefixes_are_salted_by_tenant_and_cache_key_and_never_by_the_caller(mesh: Any) -> None:
    await collect(mesh.stream("a"))
    await collect(mesh.stream("b", cache_key="x"))
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], tenant="u"),))
    await collect(mesh.stream("c"))
    salts = [request.cache_salt for worker in mesh.workers for request in worker.requests]
    assert len(set(salts)) == 3
    tenants = [request.tenant for worker in mesh.workers for request in worker.requests]
    assert sorted(tenants) == ["t", "t", "u"]
    assert all(len(salt) == 16 for salt in salts)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=200), method=st.sampled_from(["StreamGenerate", "Generate", "ListModels", "CountTokens"])
)
async def test_malformed_bytes_get_a_typed_error_and_leave_a_living_router(mesh: Any, data: bytes, method: str) -> None:
    kind = mesh.channel.unary_stream if method == "StreamGenerate" else mesh.channel.unary_unary
    call = kind(f"/meshlm.v1.InferenceService/{method}")(data, metadata=mesh.metadata, timeout=60)
    if method == "StreamGenerate":
        with contextlib.suppress(grpc.RpcError):
            await collect(call)
    assert await call.code() in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
    )
    assert (await mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=mesh.metadata)).models


async def test_an_oversized_message_gets_a_typed_error(mesh: Any) -> None:
    assert (await failure(mesh.stream("x" * (5 * 1024 * 1024)))).reason == Reason.REQUEST_INVALID
    assert text_of(await collect(mesh.stream())) == "Hello big world"


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


async def test_a_guard_that_refuses_by_its_own_policy_is_not_overruled_by_a_lenient_key(mesh: Any) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], guard_failure="allow"),))
    mesh.guard.declines = MeshError(Reason.GUARD_UNAVAILABLE, "no model")
    assert (await failure(mesh.stream())).reason == Reason.GUARD_UNAVAILABLE


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
