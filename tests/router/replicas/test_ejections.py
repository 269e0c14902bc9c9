"""What several routers ejected is left out by all, by property on a real Valkey, and never more than the share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.chassis.config import ServerConfig
from meshlm.chassis.errors import Reason
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.ejections import Ballot, Ejections, voter_of
from meshlm.router.replicas.fleet import Fleet
from tests.router.fleets import Clock, fleet
from tests.waiting import until

WANTED = Wanted(model="m")


def fail(made: Fleet, number: int, times: int = 5) -> None:
    for _ in range(times):
        made.replicas[number].begin(None, 0).end(Reason.ENGINE_LOST)
    made.choose(WANTED)


def left_out(made: Fleet) -> set[str]:
    return {e.replica.name for e in made.choose(WANTED).excluded if e.reason == "ejected"}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from(["m", "m2"])), max_size=25),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_all_leave_out_what_enough_routers_found_and_no_more_than_the_share(
    valkey: str, votes: list[tuple[int, int, str]], needed: int, replicas: int, most: float
) -> None:
    async def run() -> None:
        client: Redis = Redis.from_url(valkey, socket_timeout=60)
        await client.flushall()
        ballots = [Ballot(client, f"router{number}", needed) for number in range(4)]
        given_: dict[tuple[str, str], set[int]] = {}
        before: set[tuple[str, str]] = set()
        for router, replica, model in votes:
            place = (model, f"w{replica}")
            given_.setdefault(place, set()).add(router)
            agreed = set(await ballots[router].vote(*place, 60.0, replicas, most))
            of_model = {other for other in agreed if other[0] == model}
            assert len(of_model) < max(1, replicas) or not of_model
            assert len(of_model) <= most * replicas
            assert all(len(given_[other]) >= needed for other in agreed)
            room = len([other for other in before if other[0] == model and other != place]) + 1
            if len(given_[place]) >= needed and room < replicas and room / replicas <= most:
                assert place in agreed
            assert before <= agreed
            before = agreed
        assert set(await ballots[0].read()) == before
        await client.aclose()

    asyncio.run(run())


async def test_an_agreement_ends_when_one_router_too_few_is_left_of_it(state: Redis) -> None:
    one, two = Ballot(state, "one", 2), Ballot(state, "two", 2)
    assert await one.vote("m", "w", 60.0, 4, 0.5) == {}
    agreed = await two.vote("m", "w", 0.1, 4, 0.5)
    assert agreed[("m", "w")] <= 0.1
    async with asyncio.timeout(60):
        while await one.read():
            await asyncio.sleep(0.005)


class Routers:
    """Three of them, in front of the same four workers, with one store."""

    def __init__(self, state: Redis, **config: Any) -> None:
        self.clock = Clock()
        self.fleets: list[Fleet] = []
        self.ejections: list[Ejections] = []
        self._state = state
        self._config = config
        for number in range(3):
            self.start(f"router{number}")

    def start(self, name: str) -> Fleet:
        """One more, which knows nothing yet."""
        made = fleet(self.clock, {}, {}, {}, {}, eject_seconds=60.0, **self._config)
        config = ReplicaConfig(eject_seconds=60.0, slow_start_seconds=0.0, **self._config)
        ejections = Ejections(self._state, made, config, name)
        ejections.start()
        self.fleets.append(made)
        self.ejections.append(ejections)
        return made

    async def stop(self) -> None:
        for ejections in self.ejections:
            await ejections.stop()


@pytest.fixture
async def routers(state: Redis) -> AsyncIterator[Routers]:
    made = Routers(state)
    yield made
    await made.stop()


async def test_a_router_leaves_out_what_two_others_found_though_it_sent_nothing_there(routers: Routers) -> None:
    first, second, third = routers.fleets
    fail(first, 1)
    fail(second, 1)
    await until(lambda: left_out(third) == {"1"})
    assert left_out(first) == left_out(second) == {"1"}
    routers.clock.now += 61  # the store's time has not passed, but this router's has: it does not wait for word
    assert left_out(third) == set()


async def test_a_router_with_a_broken_network_takes_no_worker_from_the_others(routers: Routers) -> None:
    first, second, third = routers.fleets
    for number in range(4):
        fail(first, number)
    assert len(left_out(first)) == 2
    fail(second, 3)
    third_before = left_out(third)
    await until(lambda: not routers.ejections[0]._telling and not routers.ejections[1]._telling)
    assert third_before == set()
    assert left_out(second) == {"3"}  # its own


async def test_a_router_that_was_started_anew_does_not_agree_with_itself(routers: Routers, state: Redis) -> None:
    fail(routers.fleets[0], 1)
    await until(lambda: not routers.ejections[0]._telling)
    await routers.ejections[0].stop()  # its vote stays
    fail(routers.start("router0"), 1)
    await until(lambda: not routers.ejections[-1]._telling)
    assert await Ballot(state, "reader", 2).read() == {}
    fail(routers.fleets[1], 1)
    await until(lambda: not routers.ejections[1]._telling)
    assert list(await Ballot(state, "reader", 2).read()) == [("m", "1")]


def test_a_voter_is_known_by_its_place_and_the_processes_on_one_port_are_several() -> None:
    one, two = (
        ServerConfig("0.0.0.0:50051", also_listen="unix:/1"),
        ServerConfig("0.0.0.0:50051", also_listen="unix:/2"),
    )
    assert voter_of(one) == voter_of(ServerConfig("0.0.0.0:50051", also_listen="unix:/1"))
    assert len({voter_of(one), voter_of(two), voter_of(ServerConfig("0.0.0.0:50052"))}) == 3


async def test_what_it_found_alone_yields_to_what_was_agreed(routers: Routers) -> None:
    first, second, third = routers.fleets
    fail(third, 0)
    fail(third, 1)
    assert left_out(third) == {"0", "1"}
    for made in (first, second):
        fail(made, 2)
    await until(lambda: "2" in left_out(third))
    assert len(left_out(third)) == 2


async def test_by_itself_each_decides_where_that_is_configured(state: Redis) -> None:
    alone = Routers(state, eject_routers=0)
    for made in alone.fleets[:2]:
        fail(made, 1)
    assert left_out(alone.fleets[0]) == {"1"}
    assert await state.keys("*") == []
    await alone.stop()


async def test_a_store_that_does_not_answer_costs_no_router_its_own_ejections() -> None:
    nowhere: Redis = Redis.from_url("unix:///nowhere/at/all")
    cut_off = Routers(nowhere)
    fail(cut_off.fleets[0], 1)
    await until(lambda: not cut_off.ejections[0]._telling)
    assert left_out(cut_off.fleets[0]) == {"1"}
    await cut_off.stop()
