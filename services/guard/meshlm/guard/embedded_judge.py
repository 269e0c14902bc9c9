"""The embedded model behind the seam for models that judge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from meshlm.guard.conversation import gathered
from meshlm.guard.embedded import EmbeddedModel, Scored
from meshlm.guard.judging import Head, Opinion, Turn
from meshlm.guard.windows import WINDOW

# What the model calls an attack; harm goes by Llama Guard's codes.
ATTACK = "injection.model"
# Categories take a second pass, which is not worth it below.
_NAMED_FROM = 0.05

T = TypeVar("T")


class EmbeddedJudge:
    """Judges each turn by itself, and an answer by its last `WINDOW` characters: it was trained on such."""

    def __init__(self, model: EmbeddedModel, inline_chars: int = 4_096) -> None:
        """Texts longer than `inline_chars` are judged in a thread, so that other streams go on."""
        self.model = model
        self._inline_chars = inline_chars

    @property
    def version(self) -> str:
        return self.model.version

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. Needs no tenant, and does not fail."""
        judged = gathered(turns)
        return await self._run(sum(len(turn.text) for turn in judged), lambda: self._prompt(judged, tuple(heads)))

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. It does not read the conversation, and has nothing to say of attacks in an answer."""
        if "harm" not in heads:
            return []
        start = max(0, len(answer) - WINDOW)
        text = answer[start:]
        score = self.model.score(text, "harm")
        return [self._opinion("harm", Scored(score, start, len(answer), text, "plain"))]

    async def _run(self, size: int, judge: Callable[[], T]) -> T:
        return await asyncio.to_thread(judge) if size > self._inline_chars else judge()

    def _prompt(self, turns: Sequence[Turn], heads: tuple[Head, ...]) -> list[Opinion]:
        best: dict[Head, Scored] = {}
        for turn in turns:
            for head, scored in self.model.judge(turn.text, heads).items():
                if head not in best or scored.score > best[head].score:
                    best[head] = replace(scored, start=scored.start + turn.offset, end=scored.end + turn.offset)
        return [self._opinion(head, scored) for head, scored in best.items()]

    def _opinion(self, head: Head, scored: Scored) -> Opinion:
        categories: tuple[str, ...] = ()
        if scored.score >= _NAMED_FROM:
            categories = (ATTACK,) if head == "attack" else self.model.categories(scored.text)
        return Opinion(f"{self.version}/{head}", head, scored.score, categories, scored.start, scored.end)
