"""Zero trust in one model: where it is unsure whether a text is harmful, and in a sample, others judge again.

Two that agree decide. Where they do not, a third's vote does; without one the text is held: it counts as harmful.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from statistics import fmean, median
from typing import Literal

import structlog
from opentelemetry import trace

from meshlm.chassis import telemetry
from meshlm.chassis.telemetry import Name
from meshlm.guard.judging import Head, Judge, JudgeError, Opinion, Turn
from meshlm.guard.llama.config import PanelConfig

log = structlog.get_logger()

# What a held text is said to be about where nobody says more.
DISPUTED = "harm.disputed"

Ask = Callable[[Judge], Awaitable[list[Opinion]]]
# `agreed`: two votes; `decided`: three; `held`: two against each other; `skipped`: a sampled text whose second model
# could not judge.
Outcome = Literal["agreed", "decided", "held", "skipped"]


class Panel:
    """Satisfies `Judge`."""

    def __init__(self, first: Judge, second: Judge, third: Judge | None, config: PanelConfig) -> None:
        """`second` and `third` are asked about harm alone."""
        self._first, self._second, self._third = first, second, third
        self._config = config
        others = [second.version, *([third.version] if third is not None else [])]
        said = f"{config.low} {config.high} {config.sample_share} {config.unsafe_score}"
        rules = blake2b(said.encode(), digest_size=3).hexdigest()
        self.version = f"{first.version}+panel-{rules}({','.join(others)})"
        self._panels = telemetry.meter().create_counter(
            Name.GUARD_PANELS, "1", "Texts that a second model judged too, by direction and outcome"
        )

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. JudgeError too where the first model is unsure and the second cannot judge."""
        opinions = await self._first.judge_prompt(turns, heads, tenant=tenant, request_id=request_id)

        async def ask(judge: Judge) -> list[Opinion]:
            return await judge.judge_prompt(turns, ("harm",), tenant=tenant, request_id=request_id)

        return await self._weighed(opinions, ask, "input", request_id, sampled=False)

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """See `Judge`. All of a sampled answer is judged again, window by window."""
        opinions = await self._first.judge_answer(turns, answer, heads, tenant=tenant, request_id=request_id)

        async def ask(judge: Judge) -> list[Opinion]:
            return await judge.judge_answer(turns, answer, ("harm",), tenant=tenant, request_id=request_id)

        return await self._weighed(opinions, ask, "output", request_id, sampled=self._samples(request_id))

    def _samples(self, request_id: str) -> bool:
        """The same for every window of an answer, and at every guard."""
        share = int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "big") / 2**64
        return share < self._config.sample_share

    async def _weighed(
        self, opinions: list[Opinion], ask: Ask, direction: str, request_id: str, *, sampled: bool
    ) -> list[Opinion]:
        first = next((opinion for opinion in opinions if opinion.head == "harm"), None)
        if first is None:
            return opinions
        unsure = self._config.low <= first.score <= self._config.high
        if not (unsure or sampled):
            return opinions
        try:
            votes = [first, *await ask(self._second)]
        except JudgeError:
            if unsure:
                raise
            votes = [first]
        if len(votes) == 2 and self._unsafe(votes[0]) != self._unsafe(votes[1]) and self._third is not None:
            votes += await self._third_vote(ask, self._third)
        final, outcome = self._counted(votes)
        self._tell(votes, outcome, direction, request_id)
        return [final if opinion.head == "harm" else opinion for opinion in opinions]

    async def _third_vote(self, ask: Ask, third: Judge) -> list[Opinion]:
        try:
            return await ask(third)
        except JudgeError:
            return []

    def _unsafe(self, opinion: Opinion) -> bool:
        return opinion.score >= self._config.unsafe_score

    def _counted(self, votes: list[Opinion]) -> tuple[Opinion, Outcome]:
        """What the votes come to. An odd number has its middle score: it lies on the side of most."""
        agreed = len({self._unsafe(vote) for vote in votes}) == 1
        outcome: Outcome = "skipped" if len(votes) == 1 else "decided" if len(votes) > 2 else "agreed"
        if outcome == "agreed" and not agreed:
            outcome = "held"
        score = 1.0 if outcome == "held" else (median if len(votes) % 2 else fmean)(vote.score for vote in votes)
        # Who voted as the panel decides, the first before others; of a held text, who calls it harmful.
        voices = [vote for vote in votes if self._unsafe(vote) == (score >= self._config.unsafe_score)]
        strongest = next((vote for vote in voices if vote.categories), voices[0])
        categories = strongest.categories or ((DISPUTED,) if outcome == "held" else ())
        said = ",".join(f"{vote.detector}={vote.score:.2f}" for vote in votes)
        return replace(strongest, detector=f"panel:{outcome}({said})", score=score, categories=categories), outcome

    def _tell(self, votes: list[Opinion], outcome: Outcome, direction: str, request_id: str) -> None:
        self._panels.add(1, {Name.GUARD_DIRECTION: direction, Name.GUARD_PANEL: outcome})
        trace.get_current_span().set_attribute(Name.GUARD_PANEL, outcome)
        if outcome in ("decided", "held"):
            scores = {vote.detector: round(vote.score, 3) for vote in votes}
            log.warning("judging models disagree", outcome=outcome, scores=scores, request_id=request_id)
