"""What follows the store ends when it is told to, whatever the store's client makes of that."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.ejections import Ejections
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.quarantine import Quarantine
from tests.router.fleets import Clock, fleet


class Swallowing:
    """A client of a store that does not answer. It takes a cancel for the answer, as Python 3.11's wait_for may."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def register_script(self, body: str) -> Any:
        return self._run

    async def _run(self, **told: Any) -> list[bytes]:
        self.asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return []


def quarantine(store: Any, made: Fleet) -> Quarantine:
    return Quarantine(store, made, 60.0)


def ejections(store: Any, made: Fleet) -> Ejections:
    return Ejections(store, made, ReplicaConfig(), "router")


@pytest.mark.parametrize("make", [quarantine, ejections])
async def test_a_cancel_that_the_stores_client_swallows_does_not_keep_a_router_from_ending(make: Any) -> None:
    store = Swallowing()
    follower = make(store, fleet(Clock(), {}))
    follower.start()
    await store.asked.wait()
    stopping = asyncio.ensure_future(follower.stop())
    await asyncio.wait({stopping}, timeout=60)
    assert stopping.done()
