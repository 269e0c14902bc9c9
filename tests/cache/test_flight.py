"""Single flight and the store, over a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from meshlm.cache.flight import Flights, Outcome
from meshlm.cache.key import Key
from meshlm.cache.store import Found, Store, StoreLostError
from meshlm.chassis.config import StateConfig
from meshlm.v1 import cache_pb2

ANSWER = cache_pb2.CachedAnswer(stored_at=1.0)
LEASE = 30.0


class Rig:
    def __init__(self, url: str, *, lease: float = LEASE, ttl: float = 60.0, timeout: float = 60.0) -> None:
        self.store = Store(StateConfig(redis_url=url, timeout_seconds=timeout), retry_seconds=0.2)
        self.flights = Flights(self.store, lease_seconds=lease, ttl_seconds=ttl)
        self.redis: Any = Redis.from_url(url)

    async def close(self) -> None:
        await self.flights.close()
        await self.store.close()
        await self.redis.aclose()


@pytest.fixture
async def rig(valkey: Any) -> AsyncIterator[Rig]:
    made = Rig(valkey.url)
    await made.redis.flushall()
    yield made
    await made.close()


KEY = Key("a" * 16, "b" * 64)
OTHER = Key("a" * 16, "c" * 64)


async def test_twenty_identical_lookups_make_one_leader_and_share_its_answer(rig: Rig, valkey: Any) -> None:
    # Two processes' worth: the second knows of the first through the store alone.
    other = Rig(valkey.url)
    lookups = [
        asyncio.create_task(flights.look_up(KEY, wait=60))
        for _ in range(10)
        for flights in (rig.flights, other.flights)
    ]
    done, waiting = await asyncio.wait(lookups, return_when=asyncio.FIRST_COMPLETED)
    (leader,) = done
    assert leader.result().outcome is Outcome.LEAD
    assert await rig.flights.land(KEY, leader.result().flight, ANSWER)
    shared = await asyncio.gather(*waiting)
    # Who came only after the store has a hit.
    assert len(shared) == 19
    assert {landing.outcome for landing in shared} <= {Outcome.SHARED, Outcome.HIT}
    assert all(landing.answer == ANSWER for landing in shared)
    assert (await other.flights.look_up(KEY, wait=0)).outcome is Outcome.HIT
    await other.close()


async def test_one_of_those_who_wait_takes_over_after_a_release(rig: Rig) -> None:
    leader = await rig.flights.look_up(KEY, wait=0)
    waiting = [asyncio.create_task(rig.flights.look_up(KEY, wait=60)) for _ in range(3)]
    await rig.flights.release(KEY, leader.flight)
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    (heir,) = done
    assert heir.result().outcome is Outcome.LEAD
    assert await rig.flights.land(KEY, heir.result().flight, ANSWER)
    assert {landing.outcome for landing in await asyncio.gather(*rest)} == {Outcome.SHARED}


async def test_a_leader_that_dies_is_followed_when_its_lease_ends(valkey: Any) -> None:
    rig, other = Rig(valkey.url, lease=0.1), Rig(valkey.url)
    await rig.redis.flushall()
    dead = await rig.flights.look_up(KEY, wait=0)
    heir = await other.flights.look_up(KEY, wait=60)
    assert (dead.outcome, heir.outcome) == (Outcome.LEAD, Outcome.LEAD)
    assert heir.flight != dead.flight
    assert not await rig.flights.land(KEY, dead.flight, ANSWER)
    await rig.close()
    await other.close()


async def test_an_answer_that_took_longer_than_its_lease_is_kept_where_nobody_took_over(valkey: Any) -> None:
    rig = Rig(valkey.url, lease=0.05)
    await rig.redis.flushall()
    leader = await rig.flights.look_up(KEY, wait=0)
    async with asyncio.timeout(60):
        while await rig.redis.exists(KEY.flight_name):
            await asyncio.sleep(0.01)
    assert await rig.flights.land(KEY, leader.flight, ANSWER)
    assert (await rig.flights.look_up(KEY, wait=0)).answer == ANSWER
    late = cache_pb2.CachedAnswer(stored_at=2.0)
    assert not await rig.flights.land(KEY, leader.flight, late)  # what is there is as new, or newer
    await rig.close()


async def test_a_wait_ends_in_time(rig: Rig) -> None:
    await rig.flights.look_up(KEY, wait=0)
    assert (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.TIMEOUT
    assert (await asyncio.wait_for(rig.flights.look_up(KEY, wait=0.05), 60)).outcome is Outcome.TIMEOUT


async def test_a_drain_ends_every_wait_and_keeps_what_there_is(rig: Rig) -> None:
    leader = await rig.flights.look_up(KEY, wait=0)
    waiting = [asyncio.create_task(rig.flights.look_up(KEY, wait=60)) for _ in range(3)]
    await asyncio.wait(waiting, timeout=0.05)
    rig.flights.drain()
    landings = await asyncio.wait_for(asyncio.gather(*waiting), 60)
    assert {landing.outcome for landing in landings} == {Outcome.TIMEOUT}
    assert await rig.flights.land(KEY, leader.flight, ANSWER)
    assert (await rig.flights.look_up(KEY, wait=60)).outcome is Outcome.HIT


async def test_a_refresh_takes_the_lead_from_whoever_has_it(rig: Rig) -> None:
    first = await rig.flights.look_up(KEY, wait=0)
    assert await rig.flights.land(KEY, first.flight, ANSWER)
    second = await rig.flights.look_up(KEY, wait=0, refresh=True)
    third = await rig.flights.look_up(KEY, wait=0, refresh=True)
    assert (second.outcome, third.outcome) == (Outcome.LEAD, Outcome.LEAD)
    assert not await rig.flights.land(KEY, second.flight, ANSWER)
    # The older answer serves others meanwhile.
    assert (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.HIT
    assert await rig.flights.land(KEY, third.flight, cache_pb2.CachedAnswer(stored_at=2.0))
    assert (await rig.flights.look_up(KEY, wait=0)).answer.stored_at == 2.0  # type: ignore[union-attr]


async def test_a_stranger_cannot_store_or_release(rig: Rig) -> None:
    leader = await rig.flights.look_up(KEY, wait=0)
    assert not await rig.flights.land(KEY, "stranger", ANSWER)
    await rig.flights.release(KEY, "stranger")
    assert await rig.redis.get(KEY.flight_name) == leader.flight.encode()


async def test_answers_expire(valkey: Any) -> None:
    rig = Rig(valkey.url, ttl=0.5)
    await rig.redis.flushall()
    leader = await rig.flights.look_up(KEY, wait=0)
    assert await rig.flights.land(KEY, leader.flight, ANSWER)
    until = time.monotonic() + 60
    while await rig.redis.exists(KEY.answer_name):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    assert (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.LEAD
    await rig.close()


@pytest.mark.parametrize("damage", [b"", b"a1", b"junk", b"a1\x00\x00\x00\x00\x0a\xff", "cut", "flip"])
async def test_a_corrupt_answer_is_a_miss_and_is_deleted(rig: Rig, damage: bytes | str) -> None:
    leader = await rig.flights.look_up(KEY, wait=0)
    assert await rig.flights.land(KEY, leader.flight, ANSWER)
    stored = await rig.redis.get(KEY.answer_name)
    broken = {"cut": stored[:-1], "flip": stored[:-1] + bytes([stored[-1] ^ 1])}.get(str(damage), damage)
    await rig.redis.set(KEY.answer_name, broken)
    assert (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.LEAD
    assert not await rig.redis.exists(KEY.answer_name)


class GatedStore(Store):
    """Its answers are on the way until the gate opens."""

    def __init__(self, url: str) -> None:
        super().__init__(StateConfig(redis_url=url, timeout_seconds=60.0), retry_seconds=0.2)
        self.answered, self.gate = asyncio.Event(), asyncio.Event()

    async def find_or_lead(self, key: Key, flight: str, lease: float, *, refresh: bool = False) -> Found:
        found = await super().find_or_lead(key, flight, lease, refresh=refresh)
        self.answered.set()
        await self.gate.wait()
        return found


async def test_a_lookup_that_is_cancelled_while_it_wins_the_lead_gives_it_back(rig: Rig, valkey: Any) -> None:
    store = GatedStore(valkey.url)
    flights = Flights(store, lease_seconds=LEASE, ttl_seconds=60)
    task = asyncio.create_task(flights.look_up(KEY, wait=60))
    await asyncio.wait_for(store.answered.wait(), 60)
    assert await rig.redis.exists(KEY.flight_name)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    store.gate.set()
    await flights.close()
    assert not await rig.redis.exists(KEY.flight_name)
    assert not flights._waiting
    await store.close()


async def test_a_lookup_that_is_cancelled_while_it_waits_leaves_the_leader_alone(rig: Rig) -> None:
    leader = await rig.flights.look_up(KEY, wait=0)
    task = asyncio.create_task(rig.flights.look_up(KEY, wait=60))
    while not rig.flights._waiting:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.flights.close()
    assert await rig.redis.get(KEY.flight_name) == leader.flight.encode()
    assert not rig.flights._waiting


async def test_a_store_that_is_killed_is_lost_at_once_and_back_when_it_is(mortal_valkey: Any) -> None:
    rig = Rig(mortal_valkey.url)
    leader = await rig.flights.look_up(KEY, wait=0)
    waiting = asyncio.create_task(rig.flights.look_up(KEY, wait=60))
    mortal_valkey.kill()
    with pytest.raises(StoreLostError):
        await asyncio.wait_for(waiting, 60)
    with pytest.raises(StoreLostError):
        await rig.flights.land(KEY, leader.flight, ANSWER)
    assert rig.store.breaker.open
    mortal_valkey.start()
    assert (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.LEAD
    assert not rig.store.breaker.open
    await rig.close()


async def test_a_store_that_hangs_is_lost_within_the_timeout(mortal_valkey: Any) -> None:
    rig = Rig(mortal_valkey.url, timeout=1.5)
    await rig.flights.look_up(KEY, wait=0)
    mortal_valkey.process.send_signal(19)  # SIGSTOP
    for key in (OTHER, KEY):
        with pytest.raises(StoreLostError):
            await asyncio.wait_for(rig.flights.look_up(key, wait=60), 60)
    mortal_valkey.process.send_signal(18)  # SIGCONT

    async def found() -> bool:
        try:
            return (await rig.flights.look_up(KEY, wait=0)).outcome is Outcome.TIMEOUT
        except StoreLostError:
            return False

    async with asyncio.timeout(60):
        while not await found():
            await asyncio.sleep(0.05)
    await rig.flights.close()
    assert not await rig.redis.exists(OTHER.flight_name)  # nobody would have ended the flight that it began then
    assert await rig.redis.exists(KEY.flight_name)  # its leader is another
    await rig.close()
