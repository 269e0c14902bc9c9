"""A small model begins, a large one may take over: what the caller sees, what is paid, and what comes of failures.

Two models behind real sockets, `m` the small and `n` the large one, and a real ledger.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name
from meshlm.router.config import KeyConfig, LimitConfig, PriceConfig
from meshlm.router.routing.confidence import doubt_of
from meshlm.router.routing.config import ComplexityConfig, RouteConfig, RuleConfig
from meshlm.router.streams.config import StreamsConfig
from meshlm.v1 import inference_pb2
from tests.router.book import tokens_charged
from tests.router.calls import collect, failure, text_of
from tests.router.mesh import Mesh, key
from tests.waiting import until

PRICES = {
    "m": PriceConfig(prompt=1_000_000, completion=1_000_000),
    "n": PriceConfig(prompt=2_000_000, completion=5_000_000),
}
SMALL_ANSWER, LARGE_ANSWER = "Hello big world", "Good day to you"
SURE, UNSURE = -0.1, -3.0  # log-probabilities of the small model's tokens


def by_confidence(**more: Any) -> RouteConfig:
    options = {"signal": "confidence", "first_tokens": 2, "first_seconds": 60.0, "threshold": 0.5, **more}
    return RouteConfig(rules=(RuleConfig(complexity=ComplexityConfig(small="m", large="n", **options)),))


@pytest.fixture
def router_config() -> dict[str, Any]:
    return {
        "prices": PRICES,
        "streams": StreamsConfig(resume_wait_seconds=0.0),
        "routes": {
            "judged": by_confidence(),
            "learns": by_confidence(threshold=None, calibration="recent"),
            "hasty": by_confidence(first_seconds=0.05, threshold=None, small_share=0.0),
            "patient": by_confidence(first_seconds=0.05, threshold=None, small_share=1.0),
        },
    }


@pytest.fixture
def holder() -> KeyConfig:
    return key(requests_per_minute=600, tokens_per_minute=6000)


@pytest.fixture
async def pair(mesh: Mesh) -> Mesh:
    """w0 serves `m` and is sure of itself, w1 serves `n`."""
    small, large = mesh.workers
    small.logprob = SURE
    large.load.model.name, large.load.model.revision = "n", "r2"
    large.pieces = ["Good", " day", " to", " you"]
    large.changed.set()
    await until(lambda: set(mesh.fleet.models()) == {"m", "n"})
    return mesh


def steps(first: Any) -> list[tuple[str, str]]:
    return [(step.stage, step.model) for step in first.start.routing.steps]


def outcome(first: Any, stage: str) -> str:
    return next(str(step.outcome) for step in first.start.routing.steps if step.stage == stage)


async def test_a_small_model_that_is_sure_goes_on_and_the_large_one_is_never_asked(pair: Mesh) -> None:
    first, *middle, last = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, first.start.routing.model_reason) == ("m", "complexity")
    assert text_of(middle) == SMALL_ANSWER
    assert [response.chunk.token_offset for response in middle] == [0, 1, 2]
    assert last.end.cost_micros == 7 + 3
    assert pair.workers[1].requests == []
    assert steps(first) == [("rule", ""), ("complexity", "m"), ("confidence", "m")]
    assert outcome(first, "confidence") == f"doubt {1 - math.exp(SURE):.3f} up to 0.500 (as configured)"


async def test_of_a_small_model_in_doubt_nobody_sees_or_pays_anything(pair: Mesh, state: Redis) -> None:
    pair.workers[0].logprob = UNSURE
    pair.workers[0].hold = asyncio.Event()  # behind its first piece: it is told to stop, or never ends
    with capture_logs() as logs:
        call = pair.stream(model="judged")
        pair.workers[0].hold.set()
        first, *middle, last = await collect(call)
    routing = first.start.routing
    assert (routing.model, routing.replica, routing.model_reason) == ("n", "w1", "complexity")
    assert text_of(middle) == LARGE_ANSWER
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 4)
    assert last.end.cost_micros == 7 * 2 + 4 * 5
    assert list(last.end.replicas) == ["w1"]
    assert await tokens_charged(state) <= 7 + 4
    assert steps(first)[-1] == ("confidence", "n")
    (line,) = [entry for entry in logs if entry["event"] == "request"]
    assert (line["model"], line["doubt"]) == ("n", round(1 - math.exp(UNSURE), 4))


async def test_what_nobody_saw_is_counted_and_so_is_who_went_on(pair: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, dict[str, str]]] = []
    for counter in (pair.pipeline._cascade._unseen, pair.pipeline._cascade._trials):
        monkeypatch.setattr(counter, "add", lambda amount, labels: counted.append((amount, labels)))
    await collect(pair.stream(model="judged"))
    assert counted == [(1, {Name.REQUEST_MODEL: "m", "decided_by": "confidence"})]
    pair.workers[0].logprob = UNSURE
    counted.clear()
    await collect(pair.stream("hello", model="judged"))
    assert counted == [
        (1, {Name.REQUEST_MODEL: "n", "decided_by": "confidence"}),
        (7, {Name.REQUEST_MODEL: "m", "kind": "prompt_tokens"}),
        (2, {Name.REQUEST_MODEL: "m", "kind": "completion_tokens"}),
    ]


async def test_the_small_models_worker_is_told_to_stop_once_the_large_one_takes_over(pair: Mesh) -> None:
    small = pair.workers[0]
    small.logprob, small.stalls_at = UNSURE, 2
    first, *_ = await collect(pair.stream(model="judged"))
    assert first.start.routing.model == "n"
    async with asyncio.timeout(60):
        await small.cancelled.wait()


async def test_no_more_than_the_first_tokens_are_judged(pair: Mesh) -> None:
    small = pair.workers[0]
    small.hold = asyncio.Event()
    small.stalls_at = 2  # the third token never comes: it is not waited for
    small.hold.set()
    call = pair.stream(model="judged")
    first = await call.read()
    assert first.start.routing.model == "m"
    call.cancel()


async def test_an_answer_shorter_than_what_is_judged_is_judged_whole(pair: Mesh) -> None:
    pair.workers[0].pieces = ["No"]
    first, *middle, _ = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, text_of(middle)) == ("m", "No")


@pytest.mark.parametrize("asked", [False, True])
async def test_log_probabilities_go_to_the_caller_only_if_asked_for(pair: Mesh, asked: bool) -> None:
    _, *middle, _ = await collect(pair.stream(model="judged", sampling={"logprobs": 0} if asked else {}))
    assert [len(response.chunk.logprobs) for response in middle] == [int(asked)] * 3
    assert pair.workers[0].requests[0].generation.sampling.HasField("logprobs")


async def test_the_large_model_is_not_asked_for_log_probabilities_that_nobody_wants(pair: Mesh) -> None:
    pair.workers[0].logprob = UNSURE
    await collect(pair.stream(model="judged"))
    assert not pair.workers[1].requests[0].generation.sampling.HasField("logprobs")


@pytest.mark.parametrize(("route", "model"), [("hasty", "n"), ("patient", "m")])
async def test_where_the_small_model_is_slow_the_prompts_look_decides(pair: Mesh, route: str, model: str) -> None:
    small = pair.workers[0]
    small.late = asyncio.Event()
    call = pair.stream(model=route)
    first = await call.read()
    small.late.set()
    middle = await collect(call)
    assert (first.start.routing.model, text_of(middle)) == (model, LARGE_ANSWER if model == "n" else SMALL_ANSWER)
    assert outcome(first, "confidence").startswith("too late, so the prompt's look decides: score")


@pytest.mark.parametrize("logprob", [0.5, math.nan, None])
async def test_log_probabilities_that_are_none_do_not_decide(pair: Mesh, logprob: float | None) -> None:
    small = pair.workers[0]
    small.logprob, small.stalls_at = logprob, 2  # and no more tokens are waited for
    call = pair.stream(model="judged")
    first = await call.read()
    call.cancel()
    assert outcome(first, "confidence").startswith("nothing to judge, so the prompt's look decides: score")


async def test_a_small_model_that_is_down_leaves_it_to_the_large_one(pair: Mesh) -> None:
    pair.workers[0].load.ready = False
    pair.workers[0].changed.set()
    await until(lambda: not pair.fleet.ready("m"))
    first, *middle, _ = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model_reason, text_of(middle)) == ("fallback", LARGE_ANSWER)
    assert "confidence" not in dict(steps(first))


async def test_a_small_model_that_is_lost_while_it_is_judged_leaves_it_to_the_large_one(pair: Mesh) -> None:
    pair.workers[0].failure = MeshError(Reason.ENGINE_LOST, "gone")
    first, *middle, last = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, first.start.routing.model_reason) == ("n", "fallback")
    assert text_of(middle) == LARGE_ANSWER
    assert [response.chunk.token_offset for response in middle] == [0, 1, 2, 3]
    assert last.end.cost_micros == 7 * 2 + 4 * 5
    assert outcome(first, "availability") == "ENGINE_LOST"


async def test_without_a_replica_of_the_large_model_the_small_one_goes_on(pair: Mesh) -> None:
    pair.workers[0].logprob = UNSURE
    pair.workers[1].load.ready = False
    pair.workers[1].changed.set()
    await until(lambda: not pair.fleet.ready("n"))
    first, *middle, _ = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, text_of(middle)) == ("m", SMALL_ANSWER)
    assert steps(first)[-2:] == [("confidence", "n"), ("availability", "n")]
    assert len(pair.workers[0].requests) == 1


async def test_a_large_model_that_is_overloaded_leaves_it_to_the_small_one(pair: Mesh, state: Redis) -> None:
    pair.workers[0].logprob = UNSURE
    pair.workers[1].refusal = MeshError(Reason.OVERLOADED, "full")
    first, *middle, last = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, first.start.routing.model_reason) == ("m", "fallback")
    assert text_of(middle) == SMALL_ANSWER
    assert last.end.cost_micros == 7 + 3
    assert await tokens_charged(state) <= 7 + 3
    assert not pair.workers[0].requests[1].generation.sampling.HasField("logprobs")  # nothing is judged twice


async def test_a_limit_of_the_large_model_leaves_it_to_the_small_one(pair: Mesh) -> None:
    drained = {"n": LimitConfig(completion_tokens_per_minute=4)}
    pair.rekey((key(model_limits=drained),))
    await collect(pair.stream(model="n"))  # takes all there is
    pair.workers[0].logprob = UNSURE
    first, *middle, last = await collect(pair.stream(model="judged"))
    assert (first.start.routing.model, first.start.routing.model_reason) == ("m", "fallback")
    assert (text_of(middle), last.end.cost_micros) == (SMALL_ANSWER, 7 + 3)
    assert outcome(first, "availability") == "RATE_LIMITED"


async def test_a_caller_that_leaves_while_the_answer_is_judged_ends_it(pair: Mesh, state: Redis) -> None:
    small = pair.workers[0]
    small.late = asyncio.Event()
    call = pair.stream(model="judged")
    await until(lambda: small.requests)
    call.cancel()
    async with asyncio.timeout(60):
        await small.cancelled.wait()
    assert pair.workers[1].requests == []
    await until(lambda: not pair.pipeline._settling)
    assert await tokens_charged(state) == 0


async def test_a_prompt_that_is_refused_while_the_answer_is_judged_ends_it(pair: Mesh) -> None:
    small = pair.workers[0]
    small.stalls_at = 1
    pair.guard.hold = asyncio.Event()
    refusal = asyncio.ensure_future(failure(pair.stream("attack", model="judged")))
    await until(lambda: small.requests)
    pair.guard.hold.set()
    assert (await refusal).reason == Reason.INJECTION_SUSPECTED
    async with asyncio.timeout(60):
        await small.cancelled.wait()


async def test_several_answers_at_once_are_routed_by_the_prompts_look(pair: Mesh) -> None:
    pair.workers[0].logprob = UNSURE
    call = pair.stream(model="judged", sampling={"n": 2, "temperature": 1.0})
    first = await call.read()
    assert outcome(first, "complexity").startswith("score")
    assert "confidence" not in dict(steps(first))
    call.cancel()


async def test_an_answer_that_was_taken_over_is_not_kept_as_the_small_models(pair: Mesh) -> None:
    pair.workers[0].logprob = UNSURE
    await collect(pair.stream(model="judged"))
    assert pair.cache.calls == ["look_up", "release", "look_up", "store"]
    assert [asked.generation.model for asked in pair.cache.lookups] == ["m", "n"]
    first, *middle, _ = await collect(pair.stream(model="m"))
    assert (first.start.routing.reason, text_of(middle)) != ("cache_hit", LARGE_ANSWER)
    assert text_of(middle) == SMALL_ANSWER
    pair.workers[0].logprob = SURE
    first, *middle, _ = await collect(pair.stream(model="judged"))
    assert (first.start.routing.reason, text_of(middle)) == ("cache_hit", SMALL_ANSWER)


async def test_an_answer_that_was_taken_over_is_not_made_again(pair: Mesh, state: Redis) -> None:
    pair.workers[0].logprob = UNSURE
    await collect(pair.stream(model="judged"))
    charged = await tokens_charged(state)
    first, *middle, last = await collect(pair.stream(model="judged"))
    routing = first.start.routing
    assert (routing.model, routing.reason, text_of(middle)) == ("n", "cache_hit", LARGE_ANSWER)
    assert last.end.cost_micros == 0
    assert await tokens_charged(state) <= charged
    first, *middle, _ = await collect(pair.stream(model="n"))
    assert (first.start.routing.reason, text_of(middle)) == ("cache_hit", LARGE_ANSWER)
    assert len(pair.workers[1].requests) == 1


async def test_a_prompt_that_is_refused_gets_no_answer_that_was_taken_over(pair: Mesh) -> None:
    pair.workers[0].logprob = UNSURE
    await collect(pair.stream(model="judged"))
    pair.guard.policy = "p2"  # under which what was kept must be made again
    first, *middle, _ = await collect(pair.stream(model="judged"))
    assert (first.start.routing.reason, text_of(middle)) != ("cache_hit", LARGE_ANSWER)
    assert text_of(middle) == LARGE_ANSWER
    assert len(pair.workers[1].requests) == 2
    assert pair.cache.calls[-2:] == ["look_up_refresh", "store"]


async def test_the_answer_of_a_model_that_stood_in_for_a_lost_one_is_kept(pair: Mesh) -> None:
    pair.workers[0].failure = MeshError(Reason.ENGINE_LOST, "gone")
    await collect(pair.stream(model="judged"))
    first, *middle, _ = await collect(pair.stream(model="n"))
    assert (first.start.routing.reason, text_of(middle)) == ("cache_hit", LARGE_ANSWER)


async def test_whoever_asks_beforehand_learns_what_the_beginning_is_measured_by_and_nothing_is_computed(
    pair: Mesh,
) -> None:
    request = inference_pb2.ExplainRouteRequest(generation=pair.generation(model="judged"))
    told = await pair.stub.ExplainRoute(request, metadata=pair.metadata)
    step = told.routing.steps[-1]
    assert (step.stage, step.model) == ("complexity", "m")
    assert step.outcome == "begins; stays where it doubts its first 2 tokens up to 0.500 (as configured)"
    assert [worker.requests for worker in pair.workers] == [[], []]


async def test_a_rule_that_learns_keeps_the_share_of_what_it_saw(pair: Mesh) -> None:
    small = pair.workers[0]
    for number in range(100):
        small.logprob = -(number + 1) / 100
        await collect(pair.stream(str(number), model="learns", sampling={"seed": number}))
    taken = []
    for number in range(20):
        small.logprob = -(number + 0.5) / 20
        first, *_ = await collect(pair.stream(f"new {number}", model="learns"))
        taken.append(first.start.routing.model == "n")
        assert "80% of recent requests are small" in outcome(first, "confidence")
    assert 3 <= sum(taken) <= 5
    assert taken == sorted(taken)


class TestDoubt:
    def test_more_tokens_of_which_all_are_surer_change_nothing(self) -> None:
        assert doubt_of([-1.0] * 3 + [-0.01] * 50) == doubt_of([-1.0] * 3)

    @given(st.lists(st.floats(-80, 0), min_size=1, max_size=40))
    def test_it_is_between_0_and_1_and_less_where_a_token_was_likelier(self, logprobs: list[float]) -> None:
        doubt = doubt_of(logprobs)
        assert doubt is not None
        assert 0 <= doubt <= 1
        surer = doubt_of([logprob / 2 for logprob in logprobs])
        assert surer is not None
        assert surer <= doubt

    def test_the_three_least_likely_tokens_decide_by_their_geometric_mean(self) -> None:
        assert doubt_of([math.log(0.5), math.log(0.125)]) == pytest.approx(0.75)
        likely = [math.log(share) for share in (0.9, 0.5, 0.99, 0.25, 0.999, 0.125)]
        assert doubt_of(likely) == pytest.approx(0.75)

    def test_without_a_token_there_is_none(self) -> None:
        assert doubt_of([]) is None
