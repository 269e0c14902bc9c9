"""The breaker's own arithmetic, and that Valkey's copy of it does the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.router.risk.breaker import Breaker, State, wilson
from meshlm.router.risk.config import BreakerConfig
from meshlm.router.risk.standing_script import BODY

CONFIG = BreakerConfig()
SECOND = 1000.0


@dataclass
class Traffic:
    """Requests to one breaker, one after another."""

    breaker: Breaker
    now: float = 1e12
    number: int = 0

    def request(self, flagged: bool, after: float = 0.1) -> bool:
        """Whether it passed. `after`: seconds since the one before."""
        self.now += after * SECOND
        self.number += 1
        passes = self.breaker.look(str(self.number), self.now).passes
        if passes:
            self.breaker.note(str(self.number), flagged, self.now, 1.0)
        return passes

    @property
    def state(self) -> State:
        return self.breaker.look("probe", self.now).state


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(Breaker(CONFIG))


def until_open(traffic: Traffic, pattern: list[bool], after: float = 0.1, most: int = 10_000) -> int:
    """How many requests it took."""
    for count in range(most):
        if traffic.breaker.state is State.OPEN:
            return count
        traffic.request(pattern[count % len(pattern)], after)
    raise AssertionError("it never opened")


def test_the_interval_is_wilsons() -> None:
    """Expected values: R 4, prop.test(x, n, correct = FALSE)$conf.int[1]."""
    assert wilson(5, 10) == pytest.approx(0.236593, abs=1e-6)
    assert wilson(1, 100) == pytest.approx(0.001767, abs=1e-6)
    assert wilson(0, 50) == 0.0 or wilson(0, 50) == pytest.approx(0.0, abs=1e-12)


def test_four_flagged_of_four_do_not_open_it_and_five_do(traffic: Traffic) -> None:
    for _ in range(4):
        traffic.request(True)
    assert traffic.state is State.CLOSED
    traffic.request(True)
    assert traffic.state is State.OPEN


@pytest.mark.parametrize("clean", [1, 4, 9, 14])
def test_harmless_requests_between_attacks_do_not_reset_it(traffic: Traffic, clean: int) -> None:
    """Breakers that count consecutive failures never open here."""
    assert until_open(traffic, [True] + [False] * clean) <= 17 * (clean + 1)


def test_attacks_spread_over_an_hour_open_it_by_their_sum(traffic: Traffic) -> None:
    """One a minute: no window ever has more than two."""
    assert until_open(traffic, [True, False, False, False], after=15) <= 40


@pytest.mark.parametrize("share", [0.001, 0.005, 0.01])
@pytest.mark.parametrize("rate", [0.5, 20.0, 200.0])
def test_ordinary_traffic_never_opens_it(share: float, rate: float) -> None:
    traffic, chance = Traffic(Breaker(CONFIG)), Random(f"{share} {rate}")
    for _ in range(20_000):
        assert traffic.request(chance.random() < share, chance.expovariate(rate))


def test_what_is_often_flagged_becomes_ordinary_but_only_so_far(traffic: Traffic) -> None:
    chance = Random("a caller that moderates")
    breaker = traffic.breaker
    for _ in range(20_000):
        traffic.now += SECOND
        traffic.breaker.note("x", chance.random() < 0.02, traffic.now, 1.0)
        traffic.breaker.look("x", traffic.now)
    assert 0.03 < breaker.baseline(traffic.now) <= CONFIG.highest_baseline
    for _ in range(50):  # and a burst is still a burst
        traffic.breaker.note("x", True, traffic.now, 1.0)
    assert traffic.breaker.state is State.OPEN


def test_it_lets_three_probes_through_and_closes_after_three_clean_ones(traffic: Traffic) -> None:
    until_open(traffic, [True])
    breaker, opened = traffic.breaker, traffic.now
    assert not breaker.look("a", opened + 59 * SECOND).passes
    assert breaker.look("a", opened + 59 * SECOND).wait == pytest.approx(SECOND)
    now = opened + 60 * SECOND
    assert [breaker.look(name, now).passes for name in "abcda"] == [True, True, True, False, True]
    for name in "ab":
        breaker.note(name, False, now, 1.0)
    assert not breaker.look("d", now).passes, "two clean probes and one under way are three"
    breaker.note("c", False, now, 1.0)
    assert breaker.look("d", now).state is State.CLOSED


def test_one_flagged_probe_opens_it_again_for_twice_as_long(traffic: Traffic) -> None:
    until_open(traffic, [True])
    breaker, now, lengths = traffic.breaker, traffic.now, []
    for _ in range(6):
        lengths.append(breaker.until - now)
        now = breaker.until
        assert breaker.look("p", now).passes
        breaker.note("p", True, now, 1.0)
    assert lengths == [60e3, 120e3, 240e3, 480e3, 900e3, 900e3]


def test_a_probe_that_nobody_judged_or_that_never_ended_makes_room(traffic: Traffic) -> None:
    until_open(traffic, [True])
    breaker, now = traffic.breaker, traffic.breaker.until
    for name in "abc":
        assert breaker.look(name, now).passes
    assert not breaker.look("d", now).passes
    breaker.note("a", None, now, 1.0)
    assert breaker.look("d", now).passes
    later = now + CONFIG.probe_seconds * SECOND
    assert [breaker.look(name, later).passes for name in "efgh"] == [True, True, True, False]


def test_what_started_before_it_opened_neither_closes_nor_prolongs_it(traffic: Traffic) -> None:
    until_open(traffic, [True])
    until = traffic.breaker.until
    for flagged in (True, False, False, False):
        traffic.breaker.note("old", flagged, traffic.now + SECOND, 1.0)
    assert (traffic.breaker.state, traffic.breaker.until) == (State.OPEN, until)
    traffic.breaker.look("p", until)
    traffic.breaker.note("old", True, until, 1.0)
    assert traffic.breaker.state is State.HALF_OPEN, "it was no probe"


class Script:
    """Valkey's copy, with the clock in the test's hands."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.client.flushall()
        self._run = self.client.register_script("local now = tonumber(ARGV[2])\n" + BODY)

    def ask(self, operation: str, identifier: str, now: float, **told: Any) -> list[Any]:
        ask = {
            "op": operation, "id": identifier, "half_life": 600e3, "open": CONFIG.open_seconds * 1000,
            "longest": CONFIG.longest_seconds * 1000, "probe": CONFIG.probe_seconds * 1000,
            "baseline": CONFIG.baseline, "highest": CONFIG.highest_baseline, **told,
        }  # fmt: skip
        keys = [f"{{t}}:{name}" for name in ("risk", "key", "route", "score")]
        answer: list[Any] = self._run(keys=keys if operation == "look" else keys[:3], args=[json.dumps(ask), int(now)])
        return answer

    def kept(self) -> dict[str, Any]:
        value: Any = self.client.get("{t}:key")
        return json.loads(value) if value else {}


@pytest.fixture
def script(valkey: str) -> Script:
    return Script(valkey)


_STEP = st.tuples(
    st.sampled_from(["look", "note"]),
    st.integers(0, 5),  # which request
    st.sampled_from([True, True, False, None]),
    st.sampled_from([0, 1, 900, 9_000, 40_000, 61_000, 1_000_000]),  # milliseconds that pass
    st.sampled_from([0.8, 1.0, 1.2]),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(_STEP, max_size=80))
def test_valkeys_breaker_does_what_this_one_does(script: Script, steps: list[Any]) -> None:
    script.client.flushall()
    breaker, now = Breaker(CONFIG), 1_790_000_000_000
    for operation, request, flagged, passed, jitter in steps:
        now += passed
        name = f"r{request}"
        if operation == "look":
            ours = breaker.look(name, now)
            _, state, passes, wait, *_ = script.ask("look", name, now)
            assert (state.decode(), passes, wait) == (ours.state, int(ours.passes), math.floor(ours.wait))
        else:
            opened = breaker.note(name, flagged, now, jitter)
            told = -1 if flagged is None else int(flagged)
            answer = script.ask("note", name, now, risk=0, flagged=told, jitter=[jitter, jitter])
            assert answer[1] == int(opened)
    kept = script.kept()
    if kept:
        assert kept["cusum"] == pytest.approx(breaker.cusum, abs=1e-6)
        assert (kept["trips"], kept["state"]) == (breaker.trips, breaker.state)


@settings(max_examples=100, deadline=None)
@given(seen=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3_000_000)), min_size=1, max_size=30))
def test_risk_is_the_largest_that_was_seen_each_faded_by_half_in_ten_minutes(
    script: Script, seen: list[tuple[float, int]]
) -> None:
    script.client.flushall()
    now, past = 1_790_000_000_000, []
    for risk, passed in seen:
        now += passed
        past.append((risk, now))
        script.ask("note", "r", now, risk=risk, flagged=-1, jitter=[1, 1])
        expected = max(value * 0.5 ** ((now - at) / 600_000) for value, at in past)
        assert float(script.ask("look", "r", now)[0]) == pytest.approx(expected, abs=1e-4)
