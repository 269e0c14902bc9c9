"""What follows from a caller's past, through the real router amid fake peers, and in Valkey."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from redis.asyncio import Redis
from structlog.testing import capture_logs

from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.state import connect
from meshlm.router.config import KeyConfig
from meshlm.router.risk.breaker import State
from meshlm.router.risk.config import BreakerConfig, RiskConfig
from meshlm.router.risk.risk import guard_risk, is_attack
from meshlm.router.risk.standing import Caller, Standings
from meshlm.router.risk.surprise import Estimator, Surprise
from meshlm.router.risk.vigilance import Vigilance
from meshlm.router.risk.weight import weight_of
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.book import tokens_charged
from tests.router.calls import collect, failure
from tests.router.mesh import SECRET
from tests.router.valkey import run_valkey
from tests.waiting import until

ALLOW, FLAG, BLOCK = pb.Verdict.ACTION_ALLOW, pb.Verdict.ACTION_FLAG, pb.Verdict.ACTION_BLOCK
CALLER = Caller("t", "k", "m")


def limited(**more: Any) -> KeyConfig:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    return KeyConfig(id="k", secret_hash=digest, tenant="t", **{"tokens_per_minute": 6_000, **more})


def judged(
    action: pb.Verdict.Action.ValueType = ALLOW,
    score: float = 0.0,
    categories: tuple[str, ...] = (),
    *,
    outcome: str = "complete",
    error: MeshError | None = None,
    answer: pb.Verdict | None = None,
) -> Work:
    work = Work.__new__(Work)
    work.input_verdict = pb.Verdict(action=action, score=score, categories=categories)
    work.output_verdicts = [answer] if answer is not None else []
    work.outcome, work.error = outcome, error
    return work


def refused(categories: str, reason: Reason = Reason.INJECTION_SUSPECTED) -> Work:
    error = MeshError(reason, "no", metadata={"categories": categories})
    work = judged(outcome=reason, error=error)
    work.input_verdict = None
    return work


async def admission(mesh: Any, text: str = "hi") -> Any:
    return (await collect(mesh.stream(text)))[0].start.admission


class TestRisk:
    @pytest.mark.parametrize(("risk", "weight"), [(0.0, 1.0), (0.5, 2.75), (1.0, 8.0)])
    def test_weights_are_one_and_seven_times_its_square(self, risk: float, weight: float) -> None:
        assert weight_of(risk) == weight

    @pytest.mark.parametrize(
        ("work", "risk"),
        [
            (judged(), 0.0),
            (judged(score=0.74), 0.0),
            (judged(score=0.76), 0.25),
            (judged(score=1.0), 0.5),
            (judged(FLAG, 0.3, ("jailbreak.role",)), 0.5),
            (judged(FLAG, 0.8, ("jailbreak.role",)), 0.75),
            (judged(FLAG, 0.9, ("pii.email",)), 0.0),
            (refused("injection.override"), 1.0),
            (refused("S9", Reason.PROMPT_UNSAFE), 1.0),
            (refused("pii.email", Reason.PROMPT_UNSAFE), 0.0),
            (judged(answer=pb.Verdict(action=BLOCK, categories=["S1"])), 1.0),
        ],
    )
    def test_what_was_let_through_counts_half_at_most_and_personal_data_not_at_all(
        self, work: Work, risk: float
    ) -> None:
        assert guard_risk(work) == risk

    @pytest.mark.parametrize(
        ("work", "attack"),
        [
            (judged(), False),
            (judged(score=0.99), False),
            (judged(FLAG, 0.6, ("S1",)), True),
            (judged(FLAG, 0.4, ("S1",)), False),
            (judged(outcome="cancelled"), None),
            (judged(FLAG, 0.6, ("S1",), outcome="cancelled"), True),
            (judged(outcome=Reason.BUDGET_SPENT), False),
            (judged(outcome=Reason.RATE_LIMITED), None),
            (judged(answer=pb.Verdict(action=BLOCK, categories=["pii.email"])), False),
            (judged(answer=pb.Verdict(action=BLOCK, categories=["S1", "pii.email"])), True),
            (refused("injection.override", Reason.OUTPUT_UNSAFE), True),
        ],
    )
    def test_what_counts_as_an_attack(self, work: Work, attack: bool | None) -> None:
        assert is_attack(work, flag_score=0.5) is attack

    def test_without_a_verdict_nobody_can_say(self) -> None:
        work = judged()
        work.input_verdict = None
        assert is_attack(work, flag_score=0.5) is None


class TestThrottle:
    @pytest.fixture
    def holder(self) -> KeyConfig:
        return limited()

    @pytest.mark.parametrize("holder", [limited(tokens_per_minute=300)])
    async def test_after_an_attack_the_same_callers_requests_weigh_more(self, mesh: Any, state: Redis) -> None:
        assert (await admission(mesh)).weight == 1.0
        assert (await failure(mesh.stream("attack"))).reason == Reason.INJECTION_SUSPECTED
        before = await tokens_charged(state)
        told = await admission(mesh, "ho")
        assert told.weight == pytest.approx(8.0, abs=0.5)
        assert told.risk == pytest.approx(1.0, abs=0.05)
        # 7 of the prompt and 3 of the answer, 8 times; 5 a second come back meanwhile.
        assert 40 < await tokens_charged(state) - before <= 80.1

    async def test_risk_alone_never_refuses(self, mesh: Any) -> None:
        for _ in range(4):
            await failure(mesh.stream("attack"))
            assert (await collect(mesh.stream()))[-1].HasField("end")

    @pytest.mark.parametrize("router_config", [{"risk": RiskConfig(mode="shadow")}])
    async def test_in_shadow_mode_all_is_told_and_nothing_follows(self, mesh: Any, state: Redis) -> None:
        charged = 100.0
        for number in range(6):
            assert (await failure(mesh.stream("attack"))).reason == Reason.INJECTION_SUSPECTED
            before = await tokens_charged(state, 6_000)
            told = await admission(mesh, f"question {number}")
            charged = await tokens_charged(state, 6_000) - before
        assert (told.weight, told.shadow, told.shadow_refused) == (1.0, True, True)
        assert told.shadow_weight == pytest.approx(8.0, abs=0.5)
        assert charged <= 10.1

    async def test_the_audit_line_has_it(self, mesh: Any) -> None:
        with capture_logs() as lines:
            await failure(mesh.stream("attack"))
            await admission(mesh)
        first, second = (line for line in lines if line["event"] == "request")
        assert (first["risk"], first["weight"], first["breaker"], first["shadow"]) == (0.0, 1.0, "closed", False)
        assert second["risk"] == pytest.approx(1.0, abs=0.05)

    async def test_a_prompt_less_surprising_than_its_language_counts_as_not_surprising_at_all(
        self, mesh: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A histogram drops what is negative: its quantiles would be of the other prompts alone."""
        recorded: list[float] = []
        surprises = mesh.vigilance._surprises
        monkeypatch.setattr(surprises, "record", lambda amount, labels: recorded.append(amount))
        told = (await admission(mesh, "long " * 60)).surprise
        assert told < 0
        await until(lambda: recorded == [0.0])

    @pytest.mark.parametrize("holder", [limited(risk="off")])
    async def test_a_key_whose_risk_is_off_is_not_looked_at(self, mesh: Any, state: Redis) -> None:
        for _ in range(6):
            await failure(mesh.stream("attack"))
        first = (await collect(mesh.stream()))[0]
        assert not first.start.HasField("admission")
        assert await state.keys("meshlm:{t}:risk*") == []


class TestBreaker:
    async def test_five_attacks_open_the_keys_breaker_and_its_requests_are_told_when_to_come_back(
        self, mesh: Any, state: Redis
    ) -> None:
        for _ in range(5):
            assert (await failure(mesh.stream("attack"))).reason == Reason.INJECTION_SUSPECTED
        error = await failure(mesh.stream("harmless"))
        assert error.reason == Reason.BREAKER_OPEN
        assert error.retry_after is not None
        assert 20 <= error.retry_after <= 72, "60 s, a fifth more or less, and what has passed of it"
        assert len(mesh.workers[0].requests) + len(mesh.workers[1].requests) <= 5, "nothing was computed for it"

    async def test_an_answer_that_the_guard_stops_counts_as_an_attack(self, mesh: Any) -> None:
        for worker in mesh.workers:
            worker.pieces = ["a", " harm"]
        mesh.guard.stops = "harm"
        for number in range(5):
            await collect(mesh.stream(f"question {number}"))
        assert (await failure(mesh.stream("harmless"))).reason == Reason.BREAKER_OPEN

    async def test_another_key_of_the_tenant_is_tightened_and_never_shut(self, mesh: Any) -> None:
        other = KeyConfig(id="other", secret_hash=hashlib.sha256(b"other").hexdigest(), tenant="t")
        for _ in range(5):
            await failure(mesh.stream("attack"))
        mesh.rekey((other,))
        mesh.metadata = [("authorization", "Bearer other")]
        told = await admission(mesh)
        assert (told.weight, told.risk) == (8.0, 0.0)

    @pytest.mark.parametrize("router_config", [{"breakers": BreakerConfig(strict_policy="strict")}])
    async def test_a_tightened_tenant_is_judged_by_the_strict_policy_and_not_without_a_guard(self, mesh: Any) -> None:
        other = KeyConfig(
            id="other", secret_hash=hashlib.sha256(b"other").hexdigest(), tenant="t", guard_failure="allow"
        )
        for _ in range(5):
            await failure(mesh.stream("attack"))
        mesh.rekey((other,))
        mesh.metadata = [("authorization", "Bearer other")]
        await collect(mesh.stream())
        assert mesh.guard.inputs[-1].policy == "strict"
        mesh.guard.down = True
        assert (await failure(mesh.stream())).reason == Reason.GUARD_UNAVAILABLE

    @pytest.mark.parametrize("router_config", [{"breakers": BreakerConfig(open_seconds=0.05, longest_seconds=900.0)}])
    async def test_after_its_time_three_harmless_requests_close_it(self, mesh: Any, state: Redis) -> None:
        for _ in range(5):
            await failure(mesh.stream("attack"))
        states: list[str] = []
        async with asyncio.timeout(60):
            while len(states) < 3:
                try:
                    await collect(mesh.stream("harmless"))
                except grpc.RpcError as error:
                    assert from_rpc_error(error).reason == Reason.BREAKER_OPEN
                    assert not states, "a probe was refused"
                else:
                    states.append(json.loads(await state.get("meshlm:{t}:breaker:key:k"))["state"])
        assert states == ["half_open", "half_open", "closed"]


class TestStandings:
    async def test_two_routers_trip_together(self, state: Redis) -> None:
        one, two = (Standings(state, RiskConfig(), BreakerConfig()) for _ in range(2))
        for number in range(5):
            router = (one, two)[number % 2]
            assert (await router.look(CALLER, f"r{number}", "{t}:none")).passes
            opened = await router.note(CALLER, f"r{number}", risk=1.0, flagged=True)
            assert opened.key == (number == 4), "three in one and two in the other are five"
        for router in (one, two):
            seen = await router.look(CALLER, "next", "{t}:none")
            assert (seen.passes, seen.key, seen.shared) == (False, State.OPEN, True)

    async def test_an_attack_on_one_model_leaves_the_tenants_other_models_alone(self, state: Redis) -> None:
        standings = Standings(state, RiskConfig(), BreakerConfig())
        for number in range(5):
            await standings.note(CALLER, f"r{number}", risk=1.0, flagged=True)
        assert (await standings.look(Caller("t", "another", "m"), "x", "{t}:none")).route is State.OPEN
        assert (await standings.look(Caller("t", "another", "n"), "x", "{t}:none")).route is State.CLOSED
        assert (await standings.look(Caller("u", "k", "m"), "x", "{u}:none")).passes

    async def test_without_valkey_a_router_has_its_own_account_and_says_so(self, tmp_path: Path) -> None:
        with run_valkey(tmp_path) as (url, process):
            client: Redis = Redis.from_url(url, socket_timeout=60)
            standings = Standings(client, RiskConfig(), BreakerConfig())
            for number in range(3):
                await standings.note(CALLER, f"r{number}", risk=0.5, flagged=True)
            process.kill()
            process.wait()
            for number in range(3, 5):
                assert (await standings.look(CALLER, f"r{number}", "{t}:none")).passes
                await standings.note(CALLER, f"r{number}", risk=0.5, flagged=True)
            seen = await standings.look(CALLER, "next", "{t}:none")
            assert (seen.passes, seen.key, seen.shared) == (False, State.OPEN, False)
            assert seen.risk == pytest.approx(0.5, abs=0.05)
            await client.aclose()

    async def test_a_router_remembers_no_more_callers_than_it_may(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("meshlm.router.risk.standing._REMEMBERED", 10)
        standings = Standings(None, RiskConfig(), BreakerConfig())
        for number in range(30):
            caller = Caller("t", f"k{number}", "m")
            await standings.note(caller, "r", risk=0.5, flagged=True)
        assert len(standings._own._risks) == len(standings._own._breakers) == 10


class Patient(Estimator):
    """Reads a prompt only once the store was asked; the loop stands still meanwhile."""

    def __init__(self, store: redis.Redis) -> None:
        super().__init__()
        self._store = store
        self._before = self._asked()

    def _asked(self) -> int:
        told: Any = self._store.info("commandstats")
        return int(told.get("cmdstat_evalsha", {}).get("calls", 0))

    def surprise(self, text: str, tokens: int) -> Surprise | None:
        until = time.monotonic() + 60
        while self._asked() == self._before:
            assert time.monotonic() < until, "the prompt is read before the store is asked"
            time.sleep(0.01)
        return super().surprise(text, tokens)


async def test_the_store_is_asked_before_the_prompt_is_read(mesh: Any, state: Redis, valkey: str) -> None:
    """It answers beside that, in no time of the request's own."""
    shared = connect(StateConfig(redis_url=valkey, timeout_seconds=60))
    vigilance = Vigilance(mesh.config, shared, mesh.fleet)
    with redis.Redis.from_url(valkey) as store:
        for make in (Estimator, lambda: Patient(store)):  # the first has the store know its script
            vigilance._estimator = make()
            request = inference_pb2.StreamGenerateRequest(generation=mesh.generation("hello, who is there?"))
            work = Work.begin(request, limited(), ("r", "0" * 32), 60, mesh.config)
            await vigilance.look(work)
            assert work.assessment is not None
            assert work.assessment.standing.shared
    await vigilance.stop()
    await shared.aclose()


class Watching(Estimator):
    """Notes how many requests are at workers when it reads a prompt."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self._fleet = mesh.fleet
        self.sent: list[int] = []

    def surprise(self, text: str, tokens: int) -> Surprise | None:
        self.sent.append(sum(replica.in_flight for replica in self._fleet.replicas))
        return super().surprise(text, tokens)


@pytest.mark.parametrize("router_config", [{"guard": "", "cache": ""}])
@pytest.mark.parametrize(("holder", "sent"), [(limited(tokens_per_minute=0), 1), (limited(), 0)])
async def test_a_prompt_is_read_once_its_call_is_out_unless_a_limit_counts_with_its_weight(
    mesh: Any, holder: KeyConfig, sent: int
) -> None:
    mesh.vigilance._estimator = estimator = Watching(mesh)
    told = await admission(mesh, "hello, who is there? " * 3)
    assert estimator.sent == [sent], "once, then"
    assert told.surprise_source.startswith("ngram-")
