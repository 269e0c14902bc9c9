"""A small model that begins, in a mesh of real processes.

The fake's log-probabilities are hashes, far below 0: it is always in great doubt, and a route's threshold says what
comes of that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from meshlm.mesh.client import End, Start, Text
from tests.mesh.rig import Rig, running
from tests.waiting import until

pytestmark = pytest.mark.mesh

WORKERS = """
[[mesh.workers]]
name = "one"
overrides = { model = "small", "fake.text" = "small talk, at some length" }
[[mesh.workers]]
name = "two"
overrides = { model = "large", "fake.text" = "large talk" }
"""
ROUTE = """
[[router.routes.{name}.rules]]
[router.routes.{name}.rules.complexity]
small = "small"
large = "large"
signal = "confidence"
first_tokens = 4
first_seconds = 60.0
threshold = {threshold}
"""
ROUTES = ROUTE.format(name="bold", threshold=1.0) + ROUTE.format(name="timid", threshold=0.5)
PRICES = """
[router.prices.small]
prompt = 0
completion = 1_000_000
[router.prices.large]
prompt = 0
completion = 7_000_000
"""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(WORKERS, step=0.001, extra=ROUTES + PRICES) as made:
        yield made


async def ask(rig: Rig, route: str) -> tuple[str, Start, End]:
    events = [event async for event in rig.stream("hello", model=route, cache="bypass")]
    text = "".join(event.text for event in events if isinstance(event, Text))
    start = next(event for event in events if isinstance(event, Start))
    return text, start, next(event for event in events if isinstance(event, End))


async def test_doubt_decides_who_answers_and_only_that_one_is_paid_for(rig: Rig) -> None:
    text, start, end = await ask(rig, "bold")
    assert (text, start.routing.model, end.cost_micros) == ("small talk, at some length", "small", 26)
    text, start, end = await ask(rig, "timid")
    assert (text, start.routing.model, end.cost_micros) == ("large talk", "large", 70)
    assert (start.routing.model_reason, end.replicas) == ("complexity", ("two",))
    await until(rig.idle)  # the small one was told to stop


async def test_whichever_model_is_killed_the_other_answers(rig: Rig) -> None:
    async with rig.without("two"):
        text, start, _ = await ask(rig, "timid")  # whether or not the router has noticed
    assert (text, start.routing.model) == ("small talk, at some length", "small")

    async def back() -> bool:
        return (await ask(rig, "timid"))[1].routing.model == "large"

    await until(back)
    async with rig.without("one"):
        text, start, _ = await ask(rig, "timid")
    assert (text, start.routing.model) == ("large talk", "large")
