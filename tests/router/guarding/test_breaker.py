"""When a peer that does not answer is asked again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlm.router.guarding.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_failures_in_a_row_open_it_and_one_success_closes_it() -> None:
    breaker = Breaker(3, 1.0, Clock())
    for _ in range(2):
        breaker.fail()
    breaker.succeed()
    for _ in range(2):
        breaker.fail()
    assert breaker.allows()
    breaker.fail()
    assert breaker.open
    assert not breaker.allows()


def test_an_open_one_lets_a_single_call_through_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(1, 1.0, clock)
    breaker.fail()
    clock.now += 1.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.fail()
    assert not breaker.allows()
    clock.now += 1.0
    assert breaker.allows()
    breaker.succeed()
    assert all(breaker.allows() for _ in range(3))


@given(st.lists(st.sampled_from(["ask", "fail", "succeed", "wait"]), max_size=60))
def test_without_a_bound_it_never_opens_and_with_one_it_asks_at_most_once_a_period(steps: list[str]) -> None:
    clock = Clock()
    never, breaker = Breaker(0, 1.0, clock), Breaker(2, 1.0, clock)
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
            getattr(never, step)()
            getattr(breaker, step)()
