"""Settlements, and the requests that wait for them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from meshlm.router.settling import Settling


class Settlement:
    """One under way: it ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end, self.ended = asyncio.Event(), asyncio.Event(), False

    async def run(self) -> None:
        self.begun.set()
        await self.may_end.wait()
        self.ended = True


async def _steps() -> None:
    """Everything that can go on has gone on: nothing here waits for more than other tasks."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_request_that_is_cancelled_while_it_settles_ends_after_its_settlement() -> None:
    """Its call's span ends with it: attributes that come later are lost."""
    settling, settlement = Settling(), Settlement()
    request = asyncio.create_task(settling.finish(settlement.run()))
    await settlement.begun.wait()
    request.cancel()
    await _steps()
    assert not request.done()
    settlement.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert settlement.ended


async def test_a_second_cancel_ends_the_wait_and_not_the_settlement() -> None:
    settling, settlement = Settling(), Settlement()
    request = asyncio.create_task(settling.finish(settlement.run()))
    await settlement.begun.wait()
    request.cancel()
    await _steps()
    request.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(request, 30)
    assert not settlement.ended
    assert len(settling) == 1
    settlement.may_end.set()
    await settling.wait()
    assert settlement.ended
