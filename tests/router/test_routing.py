"""Routes through the real router: two models behind real sockets, a real ledger; what a caller is told and charged."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.router.accounts.limits import Terms
from meshlm.router.accounts.reservation import Reservation
from meshlm.router.config import KeyConfig, LimitConfig, PriceConfig
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.risk.assessment import Assessment
from meshlm.router.risk.standing import Caller, Standing
from meshlm.router.routing.config import ComplexityConfig, RouteConfig, RuleConfig, TargetConfig
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure, text_of
from tests.router.mesh import Mesh, key
from tests.router.risk.test_surprise import noise
from tests.waiting import until

PRICES = {
    "m": PriceConfig(prompt=1_000_000, completion=1_000_000),
    "n": PriceConfig(prompt=2_000_000, completion=5_000_000),
}


def to(*models: str, fallbacks: tuple[str, ...] = (), **more: Any) -> RuleConfig:
    targets = tuple(TargetConfig(model=model, arm=f"arm-{model}") for model in models)
    return RuleConfig(targets=targets, fallbacks=fallbacks, **more)


def by_complexity(**more: Any) -> RuleConfig:
    return RuleConfig(complexity=ComplexityConfig(small="m", large="n", **more))


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {
        "prices": PRICES,
        "routes": {
            "safe": RouteConfig(rules=(to("m", fallbacks=("n",)),)),
            "split": RouteConfig(rules=(to("m", "n"),)),
            "tasks": RouteConfig(rules=(to("m"),), sampling="by_task"),
            "easy": RouteConfig(rules=(by_complexity(threshold=1.0),)),
            "hard": RouteConfig(rules=(by_complexity(threshold=0.0),)),
            "learns": RouteConfig(rules=(by_complexity(calibration="recent"),)),
            "long": RouteConfig(rules=(to("n", min_context=60), to("m"))),
        },
    }


@pytest.fixture
def holder() -> KeyConfig:
    limited = {"n": LimitConfig(completion_tokens_per_minute=60)}
    return key(requests_per_minute=20, tokens_per_minute=300, model_limits=limited, raw_prompts=True)


@pytest.fixture
async def two(mesh: Mesh) -> Mesh:
    """w0 serves `m`, w1 serves `n`."""
    load = mesh.workers[1].load
    load.model.name, load.model.revision = "n", "r2"
    mesh.workers[1].changed.set()
    await until(lambda: set(mesh.fleet.models()) == {"m", "n"})
    return mesh


async def charged(state: Redis, limit: str, per_minute: int) -> float:
    """How many units a rate limit holds against the key now; they come back in seconds."""
    arrival = int(await state.get(f"meshlm:{{t}}:key:k:{limit}") or 0)
    seconds, micros = await state.time()
    return max(0.0, arrival - seconds * 1_000_000 - micros) * per_minute / 60_000_000


async def test_an_overloaded_models_request_is_answered_and_priced_by_its_fallback(two: Mesh) -> None:
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    first, *middle, last = await collect(two.stream(model="safe"))
    routing = first.start.routing
    assert (routing.requested, routing.model, routing.model_revision, routing.replica) == ("safe", "n", "r2", "w1")
    assert routing.model_reason == "fallback"
    assert [step.stage for step in routing.steps] == ["rule", "availability", "fallback"]
    assert text_of(middle) == "Hello big world"
    assert last.end.cost_micros == 7 * 2 + 3 * 5
    assert two.workers[1].requests[0].generation.model == "n"


async def test_a_request_that_fell_back_counts_once_and_its_tokens_under_the_model_that_answered(
    two: Mesh, state: Redis
) -> None:
    of_n = {"n": LimitConfig(completion_tokens_per_minute=20)}
    two.rekey((key(requests_per_minute=4, tokens_per_minute=300, model_limits=of_n),))
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    await collect(two.stream(model="safe"))
    assert 0 < await charged(state, "requests_per_minute", 4) <= 1
    assert await charged(state, "tokens_per_minute", 300) <= 10
    assert 0 < await charged(state, "completion_tokens_per_minute:n", 20) <= 3


async def test_a_risky_prompt_weighs_more_under_its_fallbacks_limits_though_its_first_model_has_none(
    two: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.rekey((key(model_limits={"n": LimitConfig(completion_tokens_per_minute=600)}),))
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    reserve, terms = two.ledger.reserve, []

    async def spy(identifier: str, asked: Terms, prompt: int, at_most: int) -> Reservation:
        terms.append(asked)
        return await reserve(identifier, asked, prompt, at_most)

    monkeypatch.setattr(two.ledger, "reserve", spy)
    start = (await collect(two.stream(noise(1), model="safe")))[0].start
    assert start.admission.weight > 1.2
    assert [len(asked.limits) for asked in terms] == [0, 1]
    assert terms[1].weight == pytest.approx(start.admission.weight, abs=0.01)


async def test_a_fallback_beyond_its_own_limit_is_refused_and_nothing_stays_charged(two: Mesh, state: Redis) -> None:
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    drained = {"n": LimitConfig(completion_tokens_per_minute=3)}
    two.rekey((key(requests_per_minute=20, model_limits=drained),))
    await collect(two.stream(model="n"))  # takes all there is
    before = await charged(state, "requests_per_minute", 20)
    error = await failure(two.stream(model="safe"))
    assert (error.reason, error.metadata["model"]) == (Reason.RATE_LIMITED, "n")
    assert await charged(state, "requests_per_minute", 20) <= before


async def test_a_model_that_is_down_is_passed_over_before_anything_is_reserved(two: Mesh, state: Redis) -> None:
    two.workers[0].load.ready = False
    two.workers[0].changed.set()
    await until(lambda: not two.fleet.ready("m"))
    first, *_ = await collect(two.stream(model="safe"))
    assert (first.start.routing.model, first.start.routing.model_reason) == ("n", "fallback")
    assert two.workers[0].requests == []


async def test_an_error_that_another_model_would_repeat_is_not_tried_there(two: Mesh) -> None:
    two.workers[0].refusal = MeshError(Reason.CONTEXT_TOO_LONG, "too long")
    assert (await failure(two.stream(model="safe"))).reason == Reason.CONTEXT_TOO_LONG
    assert two.workers[1].requests == []


async def test_a_fallbacks_answer_is_not_kept_as_the_other_models(two: Mesh) -> None:
    two.workers[1].load.model.revision = "r1"  # as the other's: the name alone must keep them apart
    two.workers[1].changed.set()
    await until(lambda: two.fleet.choose(Wanted(model="n")).revision == "r1")
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    await collect(two.stream(model="safe"))
    assert two.cache.calls == ["look_up", "release", "look_up", "store"]
    assert [asked.generation.model for asked in two.cache.lookups] == ["m", "n"]


async def test_the_cache_is_asked_for_the_model_and_not_for_the_route(two: Mesh) -> None:
    await collect(two.stream(model="safe"))
    first, *_ = await collect(two.stream(model="m"))
    assert first.start.routing.reason == "cache_hit"
    assert {lookup.generation.model for lookup in two.cache.lookups} == {"m"}


async def test_the_arm_is_in_the_decision_the_record_and_nowhere_for_a_named_model(two: Mesh) -> None:
    with capture_logs() as logs:
        starts = [(await collect(two.stream(model="split", session=f"s{n}")))[0].start for n in range(12)]
        (plain, *_) = await collect(two.stream(model="m"))
    arms = [start.routing.arm for start in starts]
    assert set(arms) == {"arm-m", "arm-n"}
    assert all(start.routing.arm == f"arm-{start.routing.model}" for start in starts)
    lines = [line for line in logs if line["event"] == "request"]
    assert [(line["arm"], line["model_reason"], line["requested"]) for line in lines[:-1]] == [
        (arm, "split", "split") for arm in arms
    ]
    assert (plain.start.routing.arm, lines[-1]["arm"], lines[-1]["model_reason"]) == ("", "", "named")


async def test_tokens_are_counted_by_the_model_that_the_route_leads_to(two: Mesh) -> None:
    async def count(text: str) -> str:
        chat = pb.Chat(messages=[pb.Message(role="user", content=text)])
        request = inference_pb2.CountTokensRequest(model="long", input=pb.Input(chat=chat))
        response = await two.stub.CountTokens(request, metadata=two.metadata)
        return str(response.model)

    assert await count("hi") == "m"
    assert await count("hi " * 100) == "n"


async def test_token_ids_are_counted_only_by_a_model_that_was_named(two: Mesh) -> None:
    source = pb.Input(token_ids=pb.TokenIds(ids=[1, 2]))
    with pytest.raises(grpc.RpcError) as caught:
        request = inference_pb2.CountTokensRequest(model="safe", input=source)
        await two.stub.CountTokens(request, metadata=two.metadata)
    error = from_rpc_error(caught.value)
    assert (error.reason, error.metadata["field"]) == (Reason.REQUEST_INVALID, "model")


async def test_routes_are_listed_with_what_they_lead_the_key_to(two: Mesh) -> None:
    async def listed() -> dict[str, Any]:
        response = await two.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=two.metadata)
        return {model.name: model for model in response.models}

    models = await listed()
    assert sorted(models) == ["alias", "easy", "hard", "learns", "long", "m", "n", "safe", "split", "tasks"]
    assert (list(models["safe"].targets), models["safe"].ready_replicas) == (["m", "n"], 2)
    assert (models["safe"].revision, list(models["m"].targets)) == ("", [])
    two.rekey((key(models=("n",)),))
    models = await listed()
    assert sorted(models) == ["easy", "hard", "learns", "long", "n", "safe", "split"]
    assert list(models["safe"].targets) == ["n"]


async def test_a_key_gets_only_the_models_it_may_use_through_a_route(two: Mesh) -> None:
    two.rekey((key(models=("n",)),))
    first, *_ = await collect(two.stream(model="safe"))
    assert first.start.routing.model == "n"
    two.rekey((key(models=("other",)),))
    assert (await failure(two.stream(model="safe"))).reason == Reason.KEY_NOT_ALLOWED


@pytest.mark.parametrize(
    ("text", "temperature", "top_p"),
    [("What is rain?", 0.1, None), ("Write a poem about rain", 0.8, 0.9), ("Rain", None, None)],
)
async def test_a_route_sets_the_sampling_that_the_caller_left_open_and_says_so(
    two: Mesh, text: str, temperature: float | None, top_p: float | None
) -> None:
    generation = two.generation(text, model="tasks")
    generation.sampling.ClearField("temperature")
    request = inference_pb2.StreamGenerateRequest(generation=generation)
    first, *_ = await collect(two.stub.StreamGenerate(request, metadata=two.metadata))
    sampling, routing = two.workers[0].requests[0].generation.sampling, first.start.routing
    for told in (sampling, routing):
        assert (told.temperature if told.HasField("temperature") else None) == pytest.approx(temperature)
        assert (told.top_p if told.HasField("top_p") else None) == pytest.approx(top_p)
    assert [step.stage for step in routing.steps] == ["rule", "sampling"]


@pytest.mark.parametrize(
    "asked", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5}, {"repetition_penalty": 1.1}]
)
async def test_a_route_leaves_sampling_alone_where_the_caller_set_any_of_it(two: Mesh, asked: dict[str, Any]) -> None:
    generation = two.generation("What is rain?", model="tasks")
    generation.sampling.CopyFrom(pb.Sampling(max_tokens=10, **asked))
    request = inference_pb2.StreamGenerateRequest(generation=generation)
    first, *_ = await collect(two.stub.StreamGenerate(request, metadata=two.metadata))
    sent = two.workers[0].requests[0].generation.sampling
    assert {name: pytest.approx(getattr(sent, name)) for name in asked} == asked
    assert sent.HasField("temperature") == ("temperature" in asked)
    assert not first.start.routing.HasField("temperature")


@pytest.mark.parametrize(("route", "model", "price"), [("easy", "m", 7 + 3), ("hard", "n", 7 * 2 + 3 * 5)])
async def test_the_model_that_a_prompt_needs_answers_and_is_paid_for(
    two: Mesh, route: str, model: str, price: int
) -> None:
    first, *_, last = await collect(two.stream("Why is 2 + 2 = 4?", model=route))
    routing = first.start.routing
    assert (routing.model, routing.model_reason, last.end.cost_micros) == (model, "complexity", price)
    assert [step.stage for step in routing.steps] == ["rule", "complexity"]
    assert "score 0." in routing.steps[1].outcome


async def test_a_caller_that_is_throttled_stays_so_where_its_request_falls_back(
    two: Mesh, state: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(work: Work) -> None:
        risky, caller = Standing(risk=1.0), Caller("t", "k", "m")
        work.assessment = Assessment(caller, "a", shadow=False, standing=risky, place="", ramps={}, reading=None)
        assert work.terms is not None
        work.terms = dataclasses.replace(work.terms, weight=work.weight)

    monkeypatch.setattr(two.pipeline._vigilance, "look", look)
    two.workers[0].refusal = MeshError(Reason.OVERLOADED, "full")
    first, *_ = await collect(two.stream(model="safe"))
    assert first.start.routing.model == "n"
    assert 10 < await charged(state, "tokens_per_minute", 300) <= 80  # eight times 10, less what time gave back


async def test_a_rule_that_learns_from_traffic_does_not_learn_from_questions_about_it(two: Mesh) -> None:
    recent = two.pipeline.routes._complexity._recent
    generation = two.generation("Why?", model="learns")
    request = inference_pb2.ExplainRouteRequest(generation=generation)
    told = await two.stub.ExplainRoute(request, metadata=two.metadata)
    assert told.routing.model_reason == "complexity"
    await two.stub.CountTokens(
        inference_pb2.CountTokensRequest(model="learns", input=generation.input), metadata=two.metadata
    )
    assert not recent
    await collect(two.stream("Why?", model="learns"))
    assert list(recent) == ["learns.rules[0]"]
