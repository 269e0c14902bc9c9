"""Several models as one: each judges what it has a head for, and of each head the highest score counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from meshlm.guard.judging import Head, Judge, Opinion, Turn


@dataclass(frozen=True)
class Member:
    """A judge, and what it is asked about."""

    judge: Judge
    heads: tuple[Head, ...]


class CombinedJudge:
    """Satisfies `Judge`. Where one member cannot judge, all cannot: its opinion might have been the highest."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self.version = "+".join(member.judge.version for member in members)

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`."""
        return await self._all(
            heads, lambda judge, its: judge.judge_prompt(turns, its, tenant=tenant, request_id=request_id)
        )

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`."""
        return await self._all(
            heads, lambda judge, its: judge.judge_answer(turns, answer, its, tenant=tenant, request_id=request_id)
        )

    async def _all(
        self, heads: Sequence[Head], ask: Callable[[Judge, tuple[Head, ...]], Awaitable[list[Opinion]]]
    ) -> list[Opinion]:
        wanted = [(m.judge, tuple(head for head in heads if head in m.heads)) for m in self._members]
        asked = [asyncio.ensure_future(ask(judge, its)) for judge, its in wanted if its]
        try:
            given = await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()
        best: dict[Head, Opinion] = {}
        for opinion in (opinion for opinions in given for opinion in opinions):
            if opinion.head not in best or opinion.score > best[opinion.head].score:
                best[opinion.head] = opinion
        return list(best.values())
