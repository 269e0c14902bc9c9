"""Waiting for what a test asserts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds; each is half as long again as the one before


async def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `condition` gives, or what that gives when awaited, once it is true. Raises TimeoutError after `seconds`."""
    pause = FIRST_PAUSE
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return result
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
