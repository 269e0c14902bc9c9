"""An output window whose guard talks nonsense, is silent or greedy, or whose worker fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import guard_pb2
from tests.router.guarding.answers import PLAIN, Noting, Seen, Ward, WordJudge, guarded, seen, worker


def replying(*replies: dict[str, Any]) -> Any:
    """A guard that says these things, one to each text, and then nothing."""

    async def answers(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        said = iter(replies)
        async for request in requests:
            if request.HasField("text"):
                reply = next(said, None)
                if reply is None:
                    await asyncio.Event().wait()
                yield guard_pb2.CheckOutputResponse(**(reply or {}))

    return answers


NONSENSE = {
    "released what was not sent": [{"released_chars": 6, "taken_chars": 5}],
    "took what was not sent": [{"released_chars": 5, "taken_chars": 6}],
    "judged what was not sent": [{"released_chars": 5, "taken_chars": 5, "judged_chars": 9}],
    "released less than before": [{"released_chars": 5, "taken_chars": 5}, {"released_chars": 4, "taken_chars": 10}],
    "judged less than before": [
        {"released_chars": 5, "taken_chars": 5, "judged_chars": 5},
        {"released_chars": 5, "taken_chars": 10, "judged_chars": 4},
    ],
    "a choice that is not there": [{"choice": 7, "released_chars": 5, "taken_chars": 5}],
    "a redaction of what is out": [
        {"released_chars": 5, "taken_chars": 5},
        {
            "released_chars": 10,
            "taken_chars": 10,
            "redactions": [guard_pb2.Redaction(char_start=2, char_end=7, replacement="x")],
        },
    ],
    "a redaction backwards": [
        {
            "released_chars": 0,
            "taken_chars": 5,
            "redactions": [guard_pb2.Redaction(char_start=4, char_end=2, replacement="x")],
        },
    ],
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_a_guard_that_talks_nonsense_is_a_guard_that_failed(name: str) -> None:
    out = Seen()
    with pytest.raises(MeshError) as caught:
        await seen(Ward(replying(*NONSENSE[name])), worker(["12345", "67890", "end"]), out)
    assert caught.value.reason == Reason.GUARD_UNAVAILABLE
    assert len(out.text) <= 5
    ward = Ward(replying(*NONSENSE[name]), allow=True)
    assert (await seen(ward, worker(["12345", "67890", "end"]))).text == "1234567890end"
    assert len(ward.errors) == 1


@pytest.mark.parametrize("replies", [[], [{"released_chars": 5, "taken_chars": 5}]])
async def test_a_guard_that_falls_silent_is_not_waited_for_longer_than_it_may_take(replies: list[Any]) -> None:
    ward = Ward(replying(*replies), seconds=0.05)
    with pytest.raises(MeshError) as caught:
        await seen(ward, worker(["12345", "67890", "end"]))
    assert caught.value.reason == Reason.GUARD_UNAVAILABLE
    assert [type(error) for error in ward.errors] == [TimeoutError]


async def test_a_guard_is_not_late_while_it_owes_nothing() -> None:
    async def slow() -> AsyncIterator[Any]:
        async for message in worker(["one ", "two ", "three"]):
            yield message
            if message.chunk.text == "one ":
                await asyncio.sleep(1.6)

    ward = guarded("strict", WordJudge(), seconds=1.5)  # all of this is one window
    assert (await seen(ward, slow())).text == "one two three"
    assert ward.errors == []


async def test_a_guard_that_asks_for_more_than_may_be_held_is_told_what_there_is() -> None:
    def greedy(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async def answers() -> AsyncIterator[Any]:
            told, last = 0, False
            async for request in requests:
                if request.HasField("text"):
                    told, last = told + len(request.text.text), request.text.last
                    yield guard_pb2.CheckOutputResponse(
                        taken_chars=told, released_chars=told, final=last, gather_bytes=(1 << 32) - 1
                    )

        return answers()

    ward = Noting(Ward(greedy, hold_tokens=16))
    pieces = [f"{number} " for number in range(100)]
    out = await seen(ward, worker(pieces))
    assert out.text == "".join(pieces)
    assert max(told.count(" ") for told in ward.told) == 16


async def test_what_was_judged_before_a_fault_of_the_worker_goes_out_before_it_is_told() -> None:
    out = Seen()
    with pytest.raises(MeshError) as caught:
        lost = MeshError(Reason.ENGINE_LOST, "gone")
        await seen(guarded("strict", WordJudge([7])), worker([PLAIN] * 3, failure=lost), out)
    assert caught.value.reason == Reason.ENGINE_LOST
    assert out.text == PLAIN  # 64 characters were judged: one chunk lies within


async def test_what_was_gathered_before_a_fault_of_the_worker_is_judged_too() -> None:
    ward = Noting(guarded("strict", WordJudge()))
    pieces = ["word "] * 30
    with pytest.raises(MeshError) as raised:
        await seen(ward, worker(pieces, failure=MeshError(Reason.ENGINE_LOST, "gone")))
    assert raised.value.reason == Reason.ENGINE_LOST
    assert "".join(ward.told) == "".join(pieces)
