"""`meshlm route explain`, against the scripted router and against a real mesh."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshlm.mesh.cli import run
from meshlm.v1 import generation_pb2
from meshlm.v1 import inference_pb2 as pb
from tests.mesh.fakes import KEY, ScriptedRouter
from tests.mesh.rig import TWO, running

Captured = pytest.CaptureFixture[str]


@pytest.fixture
async def router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedRouter]:
    monkeypatch.setenv("MESHLM_KEY", KEY)
    scripted = ScriptedRouter(f"unix:{tmp_path}/r")
    await scripted.start()
    yield scripted
    await scripted.stop()


async def explain(router: ScriptedRouter, *words: str) -> int:
    return await asyncio.to_thread(run, ["route", "explain", "--target", router.target, *words])


def runnable() -> pb.ExplainRouteResponse:
    chosen = pb.Candidate(replica="one", region="eu", predicted_seconds=0.042, cached_tokens=300, load=2, weight=1.0)
    routing = pb.RoutingDecision(
        model="large",
        model_reason="rule",
        replica="one",
        region="eu",
        reason="prefix",
        steps=[pb.RoutingStep(stage="rule", outcome="rule 2 fits", model="large")],
        considered=[chosen, pb.Candidate(region="us", excluded="region")],
    )
    return pb.ExplainRouteResponse(
        key_id="k",
        tenant="acme",
        regions="eu",
        priority=generation_pb2.PRIORITY_BATCH,
        prompt_tokens=12,
        completion_tokens=512,
        limits=[pb.ExplainedLimit(limit="tokens_per_minute", holder="key", holder_id="k", amount=1000, left=400)],
        ledger="shared",
        routing=routing,
        cache="asked",
        most_cost_micros=2_500_000,
    )


async def test_what_would_run_is_told_with_its_reasons(router: ScriptedRouter, capsys: Captured) -> None:
    router.explanation = runnable()
    assert await explain(router, "hello", "--session", "s", "--priority", "batch", "--model", "best") == 0
    asked = router.explained
    assert (asked.input.chat.messages[0].content, asked.session, asked.model) == ("hello", "s", "best")
    assert asked.priority == generation_pb2.PRIORITY_BATCH
    told = capsys.readouterr().out
    assert "would run on one, model large" in told
    lines = [line.split() for line in told.splitlines()]
    assert ["one", "eu", "42", "ms", "300", "2", "1.00"] in lines
    assert ["(not", "told)", "us", "region"] in lines
    assert ["tokens_per_minute", "key", "k", "all", "400", "1000"] in lines
    assert "rule 2 fits (large)" in told
    assert "at most 2.500000" in told


async def test_what_would_be_refused_is_told_first_with_its_time(router: ScriptedRouter, capsys: Captured) -> None:
    router.explanation = runnable()
    refusal = pb.ExplainedRefusal(stage="limits", reason="RATE_LIMITED", message="used up", retry_after_seconds=12.3)
    router.explanation.refusals.append(refusal)
    assert await explain(router, "hello") == 0
    assert capsys.readouterr().out.startswith("refused by limits: RATE_LIMITED, used up; again in 12.3 s")


async def test_programs_get_all_of_it(router: ScriptedRouter, capsys: Captured) -> None:
    router.explanation = runnable()
    assert await explain(router, "hello", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["routing"]["considered"][0]["predicted_seconds"] == 0.042
    assert told["limits"][0]["left"] == "400"


@pytest.mark.mesh
async def test_a_real_mesh_explains_what_it_then_does() -> None:
    async with running(TWO, step=0.001) as rig:
        told = await rig.client.explain(messages=[("user", "hello")], temperature=0.0, max_tokens=5)
        assert not told.refusals
        assert {candidate.replica for candidate in told.routing.considered} == {"one", "two"}
        assert [(await rig.load(name)).counters.steps for name in ("one", "two")] == [0, 0]
        assert await rig.text("hello", max_tokens=5)
