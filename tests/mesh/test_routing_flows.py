"""Routes in a mesh of real processes: two workers with a model each, while things die."""

from __future__ import annotations

from typing import Any

import pytest

from meshlm.chassis.errors import MeshError
from meshlm.mesh.client import End, Start, Text
from tests.mesh.rig import Rig, running
from tests.waiting import until

pytestmark = pytest.mark.mesh

WORKERS = """
[[mesh.workers]]
name = "one"
overrides = { model = "first" }
[[mesh.workers]]
name = "two"
overrides = { model = "second" }
"""
ROUTES = """
[[router.routes.safe.rules]]
targets = [{ model = "first" }]
fallbacks = ["second"]
[router.routes.shadowed]
shadow = { model = "second", share = 1.0 }
[[router.routes.shadowed.rules]]
targets = [{ model = "first" }]
[[router.routes.split.rules]]
targets = [{ model = "first", weight = 90 }, { model = "second", weight = 10, arm = "canary" }]
"""


async def start(rig: Rig, route: str, question: str = "hello", **asked: Any) -> Start:
    stream = rig.stream(question, model=route, cache="bypass", max_tokens=3, **asked)
    return next(event for event in [event async for event in stream] if isinstance(event, Start))


async def test_a_killed_models_requests_are_answered_by_its_fallback_until_it_is_back() -> None:
    async with running(WORKERS, extra=ROUTES) as rig:
        assert (await start(rig, "safe")).routing.model == "first"
        async with rig.without("one"):
            routing = (await start(rig, "safe")).routing  # whether or not the router has noticed
        assert (routing.model, routing.replica, routing.model_reason) == ("second", "two", "fallback")

        async def back() -> bool:
            return (await start(rig, "safe")).routing.model == "first"

        await until(back)


async def test_sessions_stay_on_their_arms_though_the_router_is_replaced() -> None:
    async with running(WORKERS, step=0.001, extra=ROUTES) as rig:
        names = [f"session-{number}" for number in range(60)]
        before = {name: (await start(rig, "split", session=name)).routing.arm for name in names}
        assert set(before.values()) == {"first", "canary"}
        assert list(before.values()).count("first") > 40
        rig.kill("router")

        async def heard() -> bool:
            try:
                return len([m for m in await rig.client.list_models() if m.ready_replicas and not m.targets]) == 2
            except MeshError:
                return False

        await until(heard)
        after = {name: (await start(rig, "split", "another question", session=name)).routing.arm for name in names}
        assert after == before


async def test_a_broken_stream_of_a_route_goes_on_with_the_model_that_began_it() -> None:
    async with running(WORKERS, extra=ROUTES) as rig:
        whole = await rig.text("hello", model="first", cache="bypass", max_tokens=200)
        text, models, killed = "", [], False
        async for event in rig.stream("hello", model="safe", cache="bypass", max_tokens=200, resumes=1000):
            if isinstance(event, Start):
                models.append(event.routing.model)
            if isinstance(event, Text):
                text += event.text
                if event.token_offset >= 10 and not killed:
                    killed = True
                    rig.kill("one")
            if isinstance(event, End):
                assert event.usage.completion_tokens == 200
        assert set(models) == {"first"}
        assert killed
        assert text == whole


async def test_a_shadow_model_that_is_killed_costs_no_request_and_gets_copies_again() -> None:
    async with running(WORKERS, step=0.005, extra=ROUTES) as rig:

        def copies() -> list[str]:
            lines = (rig.folder.logs / "router.log").read_text().splitlines()
            return [line for line in lines if '"event": "shadow"' in line and '"outcome": "complete"' in line]

        async def copied(count: int) -> bool:
            assert (await start(rig, "shadowed")).routing.model == "first"
            return len(copies()) > count

        await until(lambda: copied(0))
        rig.kill("two")
        for number in range(5):
            assert (await start(rig, "shadowed", f"hello {number}")).routing.model == "first"
        before = len(copies())
        await until(lambda: copied(before))
        assert "hello" not in "".join(copies())
