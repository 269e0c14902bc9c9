"""What came of the sequences since it was last told: events for the front, counters, and unfinished answers."""

from __future__ import annotations

import math

from meshlm.worker.engine.sequence import ChunkPool, ChunkScores, NonFinite, Outcome, Sequence
from meshlm.worker.messages import Embedded, Finish, Finished, NewToken, Scored, Started


class News:
    """What happened since it was last collected."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.tokens: list[NewToken] = []
        self.scored: list[Scored] = []
        self.embedded: list[Embedded] = []
        self.finished: list[Finished] = []

    def __bool__(self) -> bool:
        return bool(self.started or self.tokens or self.finished)  # an answer comes with its end


class Totals:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.steps = 0
        self.preemptions = 0
        self.cancelled = 0  # sequences ended by cancel or deadline
        self.freed_after_cancel = 0  # blocks that those gave up
        self.out_of_memory = 0  # sequences
        self.non_finite = 0  # sequences


class Answers:
    """Scores and vectors of texts that are still being computed, put together chunk by chunk."""

    def __init__(self) -> None:
        self._scores: dict[str, ChunkScores] = {}
        self._sums: dict[str, list[float]] = {}

    def add(self, sequence: Sequence, part: ChunkScores | ChunkPool) -> None:
        """What the next chunk of `sequence` gave."""
        if isinstance(part, ChunkScores):
            whole = self._scores.setdefault(sequence.id, ChunkScores([], []))
            whole.logprobs.extend(part.logprobs)
            whole.entropies.extend(part.entropies)
        elif sequence.request.pool == "mean" and sequence.id in self._sums:
            known = self._sums[sequence.id]
            self._sums[sequence.id] = [a + b for a, b in zip(known, part.vector, strict=True)]
        else:
            self._sums[sequence.id] = part.vector

    def tell(self, sequence: Sequence, news: News) -> None:
        """The whole of `sequence` is computed."""
        if sequence.id in self._scores:
            scores = self._scores.pop(sequence.id)
            news.scored.append(Scored(sequence.id, scores.logprobs, scores.entropies))
        if sequence.id in self._sums:
            vector = self._sums.pop(sequence.id)
            count = len(sequence.tokens) if sequence.request.pool == "mean" else 1
            news.embedded.append(Embedded(sequence.id, [value / count for value in vector]))

    def drop(self, sequence: Sequence) -> None:
        """`sequence` was preempted or has ended: what it has so far is void."""
        self._scores.pop(sequence.id, None)
        self._sums.pop(sequence.id, None)


def is_broken(outcome: Outcome) -> bool:
    """Whether what a chunk gave is no answer: no distribution to draw of, a score or a vector that is no number."""
    if isinstance(outcome, ChunkScores):
        return math.isnan(sum(outcome.logprobs)) or math.isnan(sum(outcome.entropies))
    if isinstance(outcome, ChunkPool):
        return not math.isfinite(sum(outcome.vector))
    return isinstance(outcome, NonFinite)


def finished(sequence: Sequence, reason: Finish, now: float, stop_token: int | None = None) -> Finished:
    return Finished(
        id=sequence.id,
        reason=reason,
        stop_token=stop_token,
        cached_tokens=sequence.cached,
        arrival=sequence.request.arrival,
        first_scheduled=sequence.first_scheduled,
        first_token=sequence.first_token,
        ended=now,
        preemptions=sequence.preemptions,
    )
