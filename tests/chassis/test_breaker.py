"""When a peer that does not answer is left alone, and when it is asked again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def failing(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.allows()
        breaker.fail()


def test_failures_in_a_row_open_it_and_one_success_closes_it(clock: Clock) -> None:
    breaker = Breaker(3, 5.0, clock=clock)
    failing(breaker, 2)
    breaker.succeed()
    failing(breaker, 2)
    assert breaker.allows()
    breaker.fail()
    assert breaker.open
    assert not breaker.admits()


def test_one_call_tries_and_a_failure_leaves_the_peer_alone_again(clock: Clock) -> None:
    breaker = Breaker(1, 1.0, clock=clock)
    failing(breaker, 1)
    clock.now += 1.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.fail()
    assert not breaker.allows()
    clock.now += 1.0
    assert breaker.allows()
    breaker.succeed()
    assert all(breaker.allows() for _ in range(3))


def test_each_try_in_vain_doubles_the_wait_up_to_a_bound(clock: Clock) -> None:
    breaker = Breaker(1, 5.0, doublings=3, clock=clock)
    failing(breaker, 1)
    for wait in (5.0, 10.0, 20.0, 40.0, 40.0):
        clock.now += wait - 0.1
        assert not breaker.admits()
        clock.now += 0.1
        failing(breaker, 1)
    clock.now += 40.0
    assert breaker.allows()
    breaker.succeed()
    failing(breaker, 1)
    clock.now += 5.0
    assert breaker.admits()  # it begins anew


def test_a_try_that_was_cancelled_lets_another_try_at_once(clock: Clock) -> None:
    breaker = Breaker(1, 5.0, clock=clock)
    failing(breaker, 1)
    clock.now += 5.0
    assert breaker.allows()
    breaker.leave()
    assert breaker.open
    assert breaker.admits()


def test_a_try_that_never_ends_lets_another_try_after_a_while(clock: Clock) -> None:
    breaker = Breaker(1, 5.0, clock=clock)
    failing(breaker, 1)
    clock.now += 5.0
    assert breaker.allows()
    clock.now += 4.9
    assert not breaker.admits()
    clock.now += 0.1
    assert breaker.admits()


def test_late_failures_of_calls_that_began_before_do_not_lengthen_the_wait(clock: Clock) -> None:
    breaker = Breaker(1, 5.0, doublings=3, clock=clock)
    for _ in range(4):
        assert breaker.allows()
    for _ in range(4):
        breaker.fail()
        clock.now += 1.0
    clock.now += 1.0
    assert breaker.admits()


@given(st.lists(st.sampled_from(["ask", "fail", "succeed", "leave", "wait"]), max_size=60))
def test_without_a_bound_it_never_opens_and_with_one_it_asks_at_most_once_a_period(steps: list[str]) -> None:
    clock = Clock()
    never, breaker = Breaker(0, 1.0, clock=clock), Breaker(2, 1.0, clock=clock)
    allowed_at = -1.0
    for step in steps:
        if step == "ask":
            assert never.allows()
            opened = breaker.open
            if breaker.allows() and opened:
                assert clock.now - allowed_at >= 1.0
                allowed_at = clock.now
        elif step == "wait":
            clock.now += 0.5
        else:
            if step == "leave":
                allowed_at = -1.0  # whoever tried told nothing
            getattr(never, step)()
            getattr(breaker, step)()
    breaker.succeed()
    assert breaker.admits()
