"""Policies asked by tests that are not async."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from meshlm.guard.judging import Turn
from meshlm.guard.policy import Policy
from meshlm.guard.stream import OutputCheck
from meshlm.v1 import generation_pb2

T = TypeVar("T")


def verdict_of(policy: Policy, *texts: str) -> generation_pb2.Verdict:
    """The verdict on an input of so many turns, each by a user."""
    turns, offset = [], 0
    for text in texts:
        turns.append(Turn("user", text, offset))
        offset += len(text) + 1
    return asyncio.run(policy.judge_input(turns))


def feed(check: OutputCheck, text: str, *, last: bool = False) -> None:
    """Give a check text that no model judges: nothing is waited for but other streams."""
    at_once(check.feed(text, last=last))


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of what waits for nothing but its turn."""
    while True:
        try:
            work.send(None)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
