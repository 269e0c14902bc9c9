"""Queues and limits: nobody is let in without room, nobody's place is lost, and the least urgent are shed first."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.concurrency import ConcurrencyLimit
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload import Overload, Place, Urgency, urgency_of
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.replicas.replica import Attempt
from meshlm.v1 import generation_pb2 as pb
from tests.router.fleets import Clock, fleet, state

CRITICAL, DEFAULT, SHEDDABLE = Urgency


def narrow(places: int, **more: Any) -> OverloadConfig:
    return OverloadConfig(
        **{"first_concurrency": places, "least_concurrency": min(places, 4), "most_concurrency": places, **more}
    )


class Crowd:
    """Callers of one router, each of whom has a place, waits, or was refused."""

    def __init__(self, config: OverloadConfig, clock: Clock, *states: dict[str, Any]) -> None:
        self.fleet: Fleet = fleet(clock, *states, overload=config)
        self.overload = Overload(config, clock)
        self.fleet.listen(self.overload.note_end, self.overload.wake)
        self.callers: list[tuple[Urgency, asyncio.Task[Place]]] = []

    async def come(self, urgency: Urgency, seconds_left: float = 60.0, model: str = "m") -> asyncio.Task[Place]:
        wanted = Wanted(model=model)
        entering = self.overload.enter(wanted, urgency, lambda: self.fleet.take(wanted, urgency.share), seconds_left)
        task = asyncio.create_task(entering)
        self.callers.append((urgency, task))
        await asyncio.sleep(0)
        return task

    def holders(self, urgency: Urgency) -> list[Attempt]:
        done = [task for kind, task in self.callers if kind is urgency and task.done() and not task.cancelled()]
        return [task.result()[1] for task in done if task.exception() is None]

    @property
    def in_flight(self) -> int:
        return sum(replica.in_flight for replica in self.fleet.replicas)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def refusal(task: asyncio.Task[Place]) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await task
    return caught.value


async def test_a_place_that_ends_goes_to_the_most_urgent_who_waits_and_then_to_the_first_who_came() -> None:
    crowd = Crowd(narrow(1), Clock(), {})
    first = await crowd.come(DEFAULT)
    batch, late, early = await crowd.come(SHEDDABLE), await crowd.come(DEFAULT), await crowd.come(CRITICAL)
    later = await crowd.come(DEFAULT)
    order = []
    holder = first
    for _ in range(4):
        (await holder)[1].end()
        await crowd.settle()
        holder = next(t for t in (batch, late, early, later) if t.done() and t not in order)
        order.append(holder)
    assert order == [early, late, later, batch]


async def test_the_last_places_of_a_worker_are_kept_for_the_urgent() -> None:
    crowd = Crowd(narrow(10), Clock(), {})
    let_in = {}
    for urgency in (SHEDDABLE, DEFAULT, CRITICAL):
        tasks = [await crowd.come(urgency) for _ in range(10)]
        let_in[urgency] = sum(task.done() for task in tasks)
    assert let_in == {SHEDDABLE: 7, DEFAULT: 2, CRITICAL: 1}
    assert crowd.in_flight == 10


async def test_a_full_queue_refuses_at_once_and_only_its_own_priority() -> None:
    crowd = Crowd(narrow(1, sheddable_queue=2), Clock(), {})
    await crowd.come(CRITICAL)
    for _ in range(2):
        await crowd.come(SHEDDABLE)
    error = await refusal(await crowd.come(SHEDDABLE))
    assert (error.reason, error.metadata) == (Reason.OVERLOADED, {"priority": "sheddable", "cause": "queue_full"})
    assert error.retry_after is not None
    assert not (await crowd.come(DEFAULT)).done()


async def test_what_cannot_meet_its_deadline_is_refused_at_once() -> None:
    clock = Clock()
    crowd = Crowd(narrow(1), clock, {})
    for _ in range(10):  # a place comes free every second
        task = await crowd.come(DEFAULT)
        clock.now += 1
        (await task)[1].end()
    await crowd.come(DEFAULT)
    for _ in range(3):
        await crowd.come(DEFAULT)
    error = await refusal(await crowd.come(DEFAULT, seconds_left=3.0))
    assert (error.reason, error.metadata["cause"]) == (Reason.OVERLOADED, "too_late")
    assert error.retry_after == pytest.approx(4, rel=0.3)
    assert not (await crowd.come(CRITICAL, seconds_left=3.0)).done()  # its turn comes before theirs


async def test_who_waited_too_long_is_told_which_it_was() -> None:
    crowd = Crowd(narrow(1, queue_seconds=0.02), Clock(), {})
    await crowd.come(DEFAULT)
    assert (await refusal(await crowd.come(DEFAULT))).metadata["cause"] == "waited"
    assert (await refusal(await crowd.come(DEFAULT, seconds_left=0.01))).reason is Reason.DEADLINE
    assert crowd.overload.waiting(DEFAULT) == 0


async def test_who_waits_for_workers_that_leave_is_told_so_and_not_left_waiting() -> None:
    crowd = Crowd(narrow(1), Clock(), {})
    await crowd.come(DEFAULT)
    waiting = await crowd.come(DEFAULT)
    crowd.fleet.replicas[0].lose()
    crowd.overload.wake()
    assert (await refusal(waiting)).reason is Reason.NO_REPLICA


async def test_a_worker_whose_own_queue_is_full_has_no_room_until_it_says_otherwise() -> None:
    crowd = Crowd(narrow(10), Clock(), {"waiting": 8, "waiting_limit": 8})
    waiting = await crowd.come(DEFAULT)
    assert not waiting.done()
    crowd.fleet.replicas[0].hear(state(0, waiting=2, waiting_limit=8))
    crowd.overload.wake()
    await crowd.settle()
    assert waiting.done()


async def test_those_who_wait_for_another_model_do_not_stand_in_the_way() -> None:
    crowd = Crowd(narrow(1), Clock(), {}, {})
    other = state(1)
    other.model.name = "n"
    crowd.fleet.replicas[1].hear(other)
    await crowd.come(CRITICAL)
    assert not (await crowd.come(CRITICAL)).done()
    assert (await crowd.come(SHEDDABLE, model="n")).done()


STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "come", "end", "fail", "cancel", "cancel_granted", "late"]), st.integers(0, 99)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 6), st.integers(1, 2))
def test_no_place_is_lost_nor_given_twice_whoever_comes_ends_fails_leaves_or_is_late(
    steps: list[tuple[str, int]], places: int, workers: int
) -> None:
    asyncio.run(_play(steps, places, workers))


async def _play(steps: list[tuple[str, int]], places: int, workers: int) -> None:
    crowd = Crowd(narrow(places, sheddable_queue=3), Clock(), *[{} for _ in range(workers)])
    held: list[Attempt] = []

    def gather() -> None:
        for urgency in Urgency:
            held.extend(attempt for attempt in crowd.holders(urgency) if attempt not in held and not attempt._ended)

    for action, number in steps:
        waiting = [task for _, task in crowd.callers if not task.done()]
        gather()
        if action == "come":
            await crowd.come(Urgency(number % 3))
        elif action == "late":
            task = await crowd.come(Urgency(number % 3), seconds_left=0.001)
            await asyncio.wait({task})
        elif action in ("end", "fail") and held:
            held.pop(number % len(held)).end(Reason.ENGINE_LOST if action == "fail" else None)
        elif action == "cancel" and waiting:
            waiting[number % len(waiting)].cancel()
        elif action == "cancel_granted" and held and waiting:
            held.pop(number % len(held)).end()  # gives its place away ...
            waiting[0].cancel()  # ... perhaps to one who leaves in the same moment
        await crowd.settle()
        assert all(replica.in_flight <= places for replica in crowd.fleet.replicas)
        left = [(urgency, task) for urgency, task in crowd.callers if not task.done()]
        for urgency, _ in left:  # whoever waits, waits for want of room
            assert not any(replica.has_room(urgency.share) for replica in crowd.fleet.replicas)
    for _, task in crowd.callers:
        task.cancel()
    await asyncio.gather(*(task for _, task in crowd.callers), return_exceptions=True)
    gather()
    for attempt in held:
        attempt.end()
    assert crowd.in_flight == 0
    assert [crowd.overload.waiting(urgency) for urgency in Urgency] == [0, 0, 0]


def test_priorities_of_the_contract_are_three_urgencies() -> None:
    assert [urgency_of(priority) for priority in pb.Priority.values()] == [
        DEFAULT,
        CRITICAL,
        DEFAULT,
        DEFAULT,
        SHEDDABLE,
    ]


# The limit of one worker


def test_routers_that_know_nothing_yet_have_together_what_one_would_have() -> None:
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=100, least_concurrency=4), Clock())
    assert limit.value == 100
    for routers, places in ((3, 33), (50, 4), (1, 100), (0, 100)):  # never below the least; and none of it is lost
        limit.divide(routers)
        assert limit.value == places


def test_what_was_learnt_is_divided_anew_and_not_forgotten() -> None:
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=100, least_concurrency=2), Clock())
    limit.divide(2)
    limit.drop(20)  # refused with 20 of this router's there
    assert limit.value == 18
    limit.divide(4)
    assert limit.value == 9
    limit.divide(1)
    assert limit.value == 36


def worker_of(capacity: int, first: int, seconds: float = 600.0, least: int = 4) -> tuple[ConcurrencyLimit, list[int]]:
    """A limit that follows a worker with so many places: beyond them requests wait, and their first tokens come later.
    Returns it with its value every second."""
    clock, chance = Clock(), random.Random(5)
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=first, least_concurrency=least), clock)
    values: list[int] = []
    while clock.now < 1000 + seconds:
        clock.now += 0.05
        in_flight = limit.value  # as many come as may
        queued = max(0, in_flight - capacity)
        limit.note_first((0.01 + 0.01 * queued) * chance.uniform(0.9, 1.1))
        limit.note_each(0.02 * chance.uniform(0.9, 1.1) * min(in_flight, capacity) / capacity)
        limit.note_end(in_flight, queued=queued > 0)
        if len(values) < clock.now - 1000:
            values.append(limit.value)
    return limit, values


def test_a_limit_that_is_too_wide_shrinks_to_what_the_worker_can_do() -> None:
    _, values = worker_of(capacity=32, first=1024)
    assert 20 <= sum(values[-60:]) / 60 <= 150


def test_a_limit_that_is_too_narrow_grows_to_what_the_worker_can_do() -> None:
    _, values = worker_of(capacity=64, first=4)
    assert max(values[-60:]) >= 60


def test_a_larger_batch_alone_does_not_shrink_it() -> None:
    clock = Clock()
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=100), clock)
    for number in range(2000):
        clock.now += 0.05
        limit.note_each(0.01 if number < 500 else 0.08)
        limit.note_end(90, queued=False)
    assert limit.value >= 100


def test_refusals_shrink_it_below_what_was_there_and_never_below_its_floor() -> None:
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=1024, least_concurrency=3), Clock())
    limit.drop(50)
    assert limit.value == 45
    for _ in range(100):
        limit.drop(50)
    assert limit.value == 3


@given(st.lists(st.tuples(st.sampled_from(["first", "each", "end", "drop"]), st.floats(0, 1e6)), max_size=200))
def test_a_limit_stays_within_its_bounds_whatever_is_measured(samples: list[tuple[str, float]]) -> None:
    clock = Clock()
    limit = ConcurrencyLimit(OverloadConfig(first_concurrency=10, least_concurrency=2, most_concurrency=20), clock)
    for kind, value in samples:
        clock.now += 0.2
        if kind == "first":
            limit.note_first(value)
        elif kind == "each":
            limit.note_each(value)
        elif kind == "end":
            limit.note_end(int(value) % 30, queued=value > 10)
        else:
            limit.drop(int(value) % 30)
        assert 2 <= limit.value <= 20
