"""Which replica is chosen, by what they pushed. No network: states are given by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.prefixes import TextPrefix
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.fleet import Choice, Fleet
from meshlm.router.replicas.residency import Regions
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.front.text_prefixes import TextPrefixes
from tests.router.fleets import Clock, fleet, state

SALT = b"salt"
TEXT = "The house rules, which every prompt of this caller begins with. " * 60


@pytest.fixture
def clock() -> Clock:
    return Clock()


def digest(text: str) -> bytes:
    """What a worker tells that has all of a text."""
    table = TextPrefixes()
    table.note([(text_hash, text_hash) for text_hash in TextPrefix(pb.Input(prompt=text), SALT).hashes()])
    return table.digest(b"\x04" + b"\xff" * 128)


def wanted(text: str = TEXT, **fields: Any) -> Wanted:
    prefix = TextPrefix(pb.Input(prompt=text), SALT)
    return Wanted(**{"model": "m", "tokens": len(text) // 4, "prefix": prefix, **fields})


def firsts(made: Fleet, what: Wanted, times: int = 400) -> Counter[str]:
    return Counter(made.choose(what).replicas[0].name for _ in range(times))


def names(choice: Choice) -> list[str]:
    return [replica.name for replica in choice.replicas]


async def test_a_cached_beginning_wins_where_loads_are_alike(clock: Clock) -> None:
    made = fleet(clock, {}, {"text_digest": digest(TEXT)}, {})
    choice = made.choose(wanted())
    assert (names(choice)[0], choice.reason) == ("1", "prefix")
    assert choice.candidates[0].cached == pytest.approx(len(TEXT) // 4, rel=0.05)
    assert choice.candidates[0].seconds < choice.candidates[1].seconds


async def test_a_cached_beginning_does_not_outweigh_a_long_queue(clock: Clock) -> None:
    made = fleet(clock, {}, {"text_digest": digest(TEXT), "running": 30, "waiting": 40})
    choice = made.choose(wanted())
    assert (names(choice)[0], choice.reason) == ("0", "least_loaded")


async def test_prompt_tokens_queued_at_a_worker_count_as_much_as_those_of_the_request(clock: Clock) -> None:
    made = fleet(clock, {"pending_prefill_tokens": 4000}, {"running": 3})
    assert firsts(made, wanted("short")) == {"1": 400}


async def test_a_worker_without_free_blocks_for_the_prompt_is_avoided(clock: Clock) -> None:
    made = fleet(clock, {"free_blocks": 0}, {})
    assert firsts(made, wanted()) == {"1": 400}


async def test_near_equals_share_the_requests_of_a_moment(clock: Clock) -> None:
    made = fleet(clock, *[{"running": 10 + number % 2} for number in range(8)])
    shares = firsts(made, wanted("hi"), 4000)
    assert len(shares) == 8
    assert max(shares.values()) < 4000 / 8 * 2.2  # the better of two drawn: at most twice its share, and some luck


async def test_requests_of_this_router_count_before_the_worker_tells_of_them(clock: Clock) -> None:
    made = fleet(clock, {}, {})
    attempts = [made.replicas[0].begin(None, 100) for _ in range(3)]
    assert firsts(made, wanted("hi")) == {"1": 400}
    clock.now += 0.01
    made.replicas[0].hear(state(0))  # left the worker before they came there
    assert firsts(made, wanted("hi")) == {"1": 400}
    clock.now += 1
    made.replicas[0].hear(state(0, running=3))  # counts them itself
    assert made.replicas[0].load == 3
    for attempt in attempts:
        attempt.end()
        attempt.end()
    assert made.replicas[0].in_flight == 0


async def test_a_burst_with_one_new_beginning_goes_where_its_first_went(clock: Clock) -> None:
    made = fleet(clock, {"text_digest": digest("else")}, {"text_digest": digest("else")})
    what = wanted()
    made.replicas[1].begin(what.prefix, 0)
    assert made.choose(what).replicas[0].name == "1"
    clock.now += 3  # by now it would be in the digest, if it were there
    assert firsts(made, what)["0"] > 250  # near-equals, but the other one has the first request in its hands


async def test_a_session_stays_and_moves_only_when_its_replica_goes(clock: Clock) -> None:
    made = fleet(clock, *[{} for _ in range(5)])
    homes = {s: made.choose(wanted("hi", session=f"s{s}")).replicas[0].name for s in range(200)}
    assert set(homes.values()) == set("01234")
    assert made.choose(wanted("hi", session="s1")).reason == "session"
    assert all(made.choose(wanted("hi", session=f"s{s}")).replicas[0].name == home for s, home in homes.items())
    made.replicas[2].lose()
    moved = {s for s, home in homes.items() if made.choose(wanted("hi", session=f"s{s}")).replicas[0].name != home}
    assert moved == {s for s, home in homes.items() if home == "2"}


async def test_a_session_yields_to_overload(clock: Clock) -> None:
    made = fleet(clock, {}, {})
    home = made.choose(wanted("hi", session="s")).replicas[0]
    home.hear(state(int(home.name), running=30, waiting=100))
    choice = made.choose(wanted("hi", session="s"))
    assert choice.replicas[0] is not home
    assert choice.reason == "least_loaded"


async def test_another_region_is_never_chosen_whatever_speaks_for_it(clock: Clock) -> None:
    made = fleet(clock, {"region": "us-east-1", "text_digest": digest(TEXT)}, {"region": "eu-west-1", "waiting": 200})
    choice = made.choose(wanted(session="s", regions=Regions((("eu",),))))
    assert names(choice) == ["1"]
    assert [(e.replica.name, e.reason) for e in choice.excluded] == [("0", "region")]


async def test_without_a_replica_in_the_region_the_request_is_refused_and_not_spilt_over(clock: Clock) -> None:
    made = fleet(clock, {"region": "us"}, {"region": "europe"}, {"region": "eu", "ready": False})
    with pytest.raises(MeshError) as caught:
        made.choose(wanted(regions=Regions((("eu",),))))
    assert (caught.value.reason, caught.value.metadata["regions"]) == (Reason.NO_REPLICA_IN_REGION, "eu")


async def test_a_new_replica_gets_its_share_little_by_little(clock: Clock) -> None:
    made = fleet(clock, {"running": 8}, {"running": 8}, {}, slow_start_seconds=10.0)
    made.replicas[0].ready_since = made.replicas[1].ready_since = clock.now - 100
    assert firsts(made, wanted("hi"))["2"] < 80  # it is idle, and yet not sent everything: about 40
    clock.now += 5
    assert 150 < firsts(made, wanted("hi"))["2"] < 290
    clock.now += 5
    assert firsts(made, wanted("hi"))["2"] == 400


async def test_replicas_of_other_weights_are_no_fallbacks(clock: Clock) -> None:
    made = fleet(clock, {}, {"revision": "r2", "running": 5}, {"running": 9})
    choice = made.choose(wanted("hi"))
    assert (names(choice), choice.revision) == (["0", "2"], "r1")
    assert [(e.replica.name, e.reason) for e in choice.excluded] == [("1", "other_revision")]


def fail(made: Fleet, number: int, times: int, reason: Reason = Reason.ENGINE_LOST) -> None:
    for _ in range(times):
        made.replicas[number].begin(None, 0).end(reason)


async def test_failures_in_a_row_eject_a_replica_and_it_comes_back_later_each_time(clock: Clock) -> None:
    made = fleet(clock, {}, {}, {}, eject_failures=3, eject_seconds=10.0)
    fail(made, 1, 2)
    assert "1" in names(made.choose(wanted("hi")))
    fail(made, 1, 1)
    choice = made.choose(wanted("hi"))
    assert "1" not in names(choice)
    assert [(e.replica.name, e.reason) for e in choice.excluded] == [("1", "ejected")]
    clock.now += 10.5
    assert "1" in names(made.choose(wanted("hi")))
    fail(made, 1, 3)
    made.choose(wanted("hi"))
    clock.now += 10.5
    assert "1" not in names(made.choose(wanted("hi")))
    clock.now += 10.5
    assert "1" in names(made.choose(wanted("hi")))


async def test_no_more_than_their_share_is_ejected_and_never_the_last(clock: Clock) -> None:
    made = fleet(clock, {}, {}, {}, {}, eject_failures=1)
    for number in range(4):
        fail(made, number, 5)
    assert len(names(made.choose(wanted("hi")))) == 2
    alone = fleet(clock, {}, eject_failures=1)
    fail(alone, 0, 50)
    assert names(alone.choose(wanted("hi"))) == ["0"]


async def test_where_only_ejected_ones_are_left_they_are_tried(clock: Clock) -> None:
    made = fleet(clock, {}, {}, eject_failures=1)
    fail(made, 0, 1)
    made.choose(wanted("hi"))
    made.replicas[1].lose()
    choice = made.choose(wanted("hi"))
    assert (names(choice), choice.reason) == (["0"], "last_resort")


async def test_refusals_of_a_busy_worker_and_callers_that_leave_eject_nobody(clock: Clock) -> None:
    made = fleet(clock, {}, {}, eject_failures=1)
    fail(made, 0, 50, Reason.OVERLOADED)
    for _ in range(50):
        made.replicas[0].begin(None, 0).end()
    assert len(names(made.choose(wanted("hi")))) == 2


def answers(made: Fleet, clock: Clock, number: int, seconds: float, count: int = 30) -> None:
    for _ in range(count):
        attempt = made.replicas[number].begin(None, 0)
        clock.now += seconds
        usage = pb.Usage(prompt_tokens=20, completion_tokens=1)
        attempt.note(worker_pb2.RunGenerationResponse(chunk=pb.Chunk(token_count=1), usage=usage))
        clock.now += 10 * seconds
        usage.completion_tokens = 11
        attempt.note(worker_pb2.RunGenerationResponse(end=worker_pb2.GenerationEnd(), usage=usage))
        attempt.end()


async def test_a_replica_much_slower_than_its_peers_is_ejected_and_one_somewhat_slower_is_not(clock: Clock) -> None:
    made = fleet(clock, {}, {}, {}, eject_slowness=5.0)
    answers(made, clock, 0, 0.02)
    answers(made, clock, 1, 0.05)
    answers(made, clock, 2, 0.3)
    choice = made.choose(wanted("hi"))
    assert {e.replica.name: e.reason for e in choice.excluded} == {"2": "ejected"}
    assert made.replicas[2].health.cause == "slow"


async def test_the_pace_of_prefill_is_learnt_from_answers(clock: Clock) -> None:
    made = fleet(clock, {})
    replica = made.replicas[0]
    for _ in range(40):
        attempt = replica.begin(None, 0)
        usage = pb.Usage(prompt_tokens=1000, cached_prompt_tokens=600, completion_tokens=1)
        attempt.note(worker_pb2.RunGenerationResponse(chunk=pb.Chunk(), usage=usage))
        end = worker_pb2.GenerationEnd(timing=pb.Timing(prefill=2.0))
        attempt.note(worker_pb2.RunGenerationResponse(end=end, usage=usage))
        attempt.end()
    assert replica.prefill_seconds == pytest.approx(2.0 / 400, rel=0.01)


async def test_what_ended_since_a_worker_last_told_is_no_load_any_more(clock: Clock) -> None:
    made = fleet(clock, {}, {})
    attempt = made.replicas[0].begin(None, 900)
    clock.now += 0.02
    made.replicas[0].hear(state(0, running=1, pending_prefill_tokens=900))
    clock.now += 0.02
    usage = pb.Usage(prompt_tokens=900, completion_tokens=1)
    attempt.note(worker_pb2.RunGenerationResponse(chunk=pb.Chunk(token_count=1), usage=usage))
    attempt.end()
    assert made.replicas[0].load == 0
    assert firsts(made, wanted("hi"))["0"] > 100  # as good as the other one


async def test_what_an_engine_that_died_had_cached_is_not_expected_of_the_next_one(clock: Clock) -> None:
    made = fleet(clock, {}, {})
    what = wanted()
    made.replicas[1].begin(what.prefix, 0).end()
    assert made.choose(what).candidates[0].cached > 500
    made.replicas[1].hear(state(1, counters=worker_pb2.EngineCounters(engine_starts=2)))
    assert {candidate.cached for candidate in made.choose(what).candidates} == {0}
