"""When a worker is left alone, and when it is trusted again."""

from __future__ import annotations

from meshlm.guard.llama.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def failing(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        assert breaker.admits()
        breaker.begin()
        breaker.fail()


def test_a_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(3, 5.0, Clock())
    failing(breaker, 2)
    breaker.begin()
    breaker.succeed()
    failing(breaker, 2)
    assert breaker.admits()
    failing(breaker, 1)
    assert not breaker.admits()


def test_one_call_tries_and_each_failure_doubles_the_wait_up_to_a_bound() -> None:
    clock = Clock()
    breaker = Breaker(1, 5.0, clock)
    failing(breaker, 1)
    for wait in (5.0, 10.0, 20.0, 40.0, 40.0):
        clock.now += wait - 0.1
        assert not breaker.admits()
        clock.now += 0.1
        assert breaker.admits()
        breaker.begin()
        assert not breaker.admits()  # the one that tries is enough
        breaker.fail()
    clock.now += 40.0
    breaker.begin()
    breaker.succeed()
    assert breaker.admits()
    failing(breaker, 1)
    clock.now += 5.0
    assert breaker.admits()  # it begins anew


def test_a_trial_that_was_cancelled_lets_another_try() -> None:
    clock = Clock()
    breaker = Breaker(1, 5.0, clock)
    failing(breaker, 1)
    clock.now += 5.0
    breaker.begin()
    breaker.leave()
    assert breaker.admits()
    assert breaker.open
