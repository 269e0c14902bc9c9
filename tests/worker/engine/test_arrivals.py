"""What an idle engine takes into its first step (`engine/process.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from meshlm.worker.engine.process import GATHER_ROUNDS, arrivals
from meshlm.worker.messages import Cancel, Limits, Sampling, Stop, Submit, ToEngine


def submit(number: int) -> Submit:
    return Submit(id=str(number), prompt=[1], sampling=Sampling(), limits=Limits(max_tokens=1))


class Inbox:
    """Messages that come while the engine sleeps: `later[n]` within its sleep number n."""

    def __init__(self, first: Sequence[ToEngine], later: Sequence[Sequence[ToEngine]]) -> None:
        self._there = list(first)
        self._later = list(later)
        self.slept = 0

    def receive(self, wait_seconds: float) -> list[ToEngine]:
        there, self._there = self._there, []
        return there

    def sleep(self, seconds: float) -> None:
        if self.slept < len(self._later):
            self._there += self._later[self.slept]
        self.slept += 1


def gathered(first: Sequence[ToEngine], later: Sequence[Sequence[ToEngine]] = ()) -> tuple[list[ToEngine], int]:
    """What the engine gets, and how often it slept for it."""
    inbox = Inbox(first, later)
    return arrivals(inbox.receive, inbox.sleep), inbox.slept


def test_prompts_that_follow_the_first_at_once_are_computed_with_it_not_behind_it() -> None:
    burst = [submit(number) for number in range(5)]
    assert gathered(burst[:1], [burst[1:3], burst[3:]]) == (burst, 3)


def test_a_lone_prompt_waits_once_for_company_and_not_longer() -> None:
    late = [submit(1)]
    assert gathered([submit(0)], [[], late]) == ([submit(0)], 1)


def test_prompts_without_end_do_not_keep_the_first_from_its_step() -> None:
    stream = [[submit(number)] for number in range(1, 3 * GATHER_ROUNDS)]
    messages, slept = gathered([submit(0)], stream)
    assert slept == GATHER_ROUNDS
    assert messages == [submit(number) for number in range(GATHER_ROUNDS + 1)]


def test_an_engine_without_prompts_does_not_wait_for_any() -> None:
    assert gathered([]) == ([], 0)
    assert gathered([Cancel(id="0")]) == ([Cancel(id="0")], 0)
    assert gathered([Stop()], [[submit(0)]]) == ([Stop()], 0)
