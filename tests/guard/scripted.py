"""A judge whose opinions follow from words in the text, and which can be made late or unable."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from meshlm.guard.judging import Head, JudgeError, Opinion, Turn


class ScriptedJudge:
    """The score of a text is the highest of the words in it; of an answer, in its last `reads` characters."""

    version = "scripted-1"

    def __init__(self, words: Mapping[str, float], *, reads: int = 10_000, category: str = "S1") -> None:
        self.words = words
        self.reads = reads
        self.category = category
        self.fails = False
        self.late: asyncio.Event | None = None  # opinions of answers wait for it
        self.answers: list[str] = []  # that were asked about
        self.asked: list[tuple[str, str]] = []  # tenant and request
        self.running = 0

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        self.asked.append((tenant, request_id))
        if self.fails:
            raise JudgeError
        text = "\n".join(turn.text for turn in turns if turn.judged)
        return [self._opinion(text, head) for head in heads]

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        self.asked.append((tenant, request_id))
        self.answers.append(answer)
        self.running += 1
        try:
            if self.late is not None:
                await self.late.wait()
        finally:
            self.running -= 1
        if self.fails:
            raise JudgeError
        return [self._opinion(answer, "harm")]

    def _opinion(self, text: str, head: Head) -> Opinion:
        read = text[-self.reads :]
        score, word = max(((s, w) for w, s in self.words.items() if w in read), default=(0.01, ""))
        start = text.rfind(word) if word else 0
        categories = ("injection.model",) if head == "attack" else (self.category,)
        return Opinion(f"{self.version}/{head}", head, score, categories, start, start + len(word))
