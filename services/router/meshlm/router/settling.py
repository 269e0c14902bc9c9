"""What is finished even where the request that it belongs to was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


class Settling:
    """Settlements under way; `len` is how many."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def finish(self, settlement: Awaitable[None]) -> None:
        """Wait for it, also where the wait is cancelled: the call's span ends after it, and the record's attributes are
        for that span. A second cancel ends the wait; the settlement goes on."""
        task = asyncio.ensure_future(settlement)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    async def wait(self) -> None:
        """Until all under way are done, however they end."""
        if self._tasks:
            await asyncio.wait(self._tasks)
