"""How much of a prompt is computed in the next step.

Where the runner's results do not depend on how a prompt is cut (`facts.chunk_invariant`), chunks are as long as the
promise to running streams allows (`pace.py`), or `chunk_tokens` where no settled stream is being decoded: a stream is
settled from its eighth token on. So prompts that arrive together are computed together, at full speed, and
the first of them to speak pause once, early, for the others. Elsewhere they end at multiples of `chunk_tokens` whatever
else is in the step, so that tokens can be reproduced. With a KV budget by importance the last tokens of a prompt are
never cut apart (`budgets.py`), in either case: there the promise may be broken once.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.engine.pace import Pace
from meshlm.worker.engine.sequence import Chunk, Sequence

SETTLED = 8  # tokens of output


@dataclass(slots=True)
class Room:
    """Tokens that may still join a step."""

    all: int
    prompt: int  # of those, what the promise to running streams leaves; what cannot be cut may exceed it


def generates(sequence: Sequence) -> bool:
    """Whether tokens are drawn; the others are texts to be scored or embedded."""
    return sequence.request.score_from is None and sequence.request.pool is None


class Chunking:
    """Cuts prompts into chunks."""

    def __init__(self, budgets: Budgets, pace: Pace | None, chunk_tokens: int, step_tokens: int) -> None:
        """pace: None where results depend on how prompts are cut."""
        self._budgets = budgets
        self._pace = pace
        self._chunk_tokens = chunk_tokens
        self._step_tokens = step_tokens

    def room(self, decodes: Items[Chunk]) -> Room:
        """What is left of a step with these decodes."""
        left = self._step_tokens - len(decodes)
        settled = any(chunk.sequence.output_length >= SETTLED for chunk in decodes)
        return Room(left, min(left, self._pace.allowance(len(decodes))) if self._pace and settled else left)

    def fits(self, sequence: Sequence, room: Room) -> bool:
        """Whether `sequence` could start with a chunk in what is left, however little of it is cached."""
        least, budget = 1, sequence.request.kv
        if self._pace is None:
            least = min(self._chunk_tokens, len(sequence.tokens))
        elif budget is not None:
            first, end = self._budgets.observation(sequence, budget)
            least = 1 if first else end
        return room.prompt > 0 and room.all >= least

    def next(self, sequence: Sequence, room: Room) -> Chunk | None:
        """The next chunk, taken out of `room`. None, and no room for others either, where it does not fit."""
        start, known, budget = sequence.computed, len(sequence.tokens), sequence.request.kv
        end = min(self._latest_end(sequence), known)
        if self._pace is not None:
            end = min(end, start + room.prompt)
        if budget is not None:
            end = self._budgets.chunk_end(sequence, budget, end)
        count = end - start
        if room.prompt <= 0 or count > room.all:
            room.prompt = 0
            return None
        room.all -= count
        room.prompt = min(room.prompt - count, room.all)
        return Chunk(sequence, start, count, sample=end == known and generates(sequence))

    def observe(self, chunks: Items[Chunk], seconds: float) -> None:
        """The step with these chunks took so long. Their new tokens are not yet known."""
        if self._pace is not None and chunks:
            decodes = sum(chunk.count == 1 and chunk.sample for chunk in chunks)
            self._pace.observe(decodes, sum(chunk.count for chunk in chunks) - decodes, seconds)

    def _latest_end(self, sequence: Sequence) -> int:
        budget, start, size = sequence.request.kv, sequence.computed, self._chunk_tokens
        if budget is not None:
            return self._budgets.next_cut(sequence, budget)
        return start + size if self._pace is not None else start - start % size + size
