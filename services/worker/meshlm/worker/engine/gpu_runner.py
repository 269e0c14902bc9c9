"""Runs a decoder on a GPU over the chunks of a step, and where it can one step ahead of the scheduler.

While the device computes a step, the runner launches the one that follows if every sequence goes on: its tokens are
drawn from what is still on the device. So the device has work while the scheduler makes up its mind, and nobody waits
for anything but drawn tokens. When the scheduler asks for its next step, it is matched with what is under way: rows of
sequences that ended are thrown away, and what the guess lacks, such as a new prompt, is computed behind it.

A row that was computed in vain wrote one slot behind its sequence's tokens, in a block that was its own. Whoever holds
that block next writes before it reads, and all steps run in the order of one stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from meshlm.worker.engine.flight import Flight, Row
from meshlm.worker.engine.sequence import (
    Chunk,
    ChunkPool,
    ChunkScores,
    Outcome,
    Sequence,
    StepOutOfMemory,
    scored_positions,
)
from meshlm.worker.messages import ModelFacts

if TYPE_CHECKING:  # it needs Triton; this file does not
    from meshlm.worker.engine.gpu_steps import GpuSteps

SCORED_AT_ONCE = 64  # tokens of a text: each takes several floats for every token of the vocabulary


class GpuRunner:
    """The `Runner` of the engine on a GPU. Not thread-safe: one engine calls it."""

    def __init__(self, steps: GpuSteps, facts: ModelFacts) -> None:
        self._steps = steps
        self._facts = facts
        self._ahead: Flight | None = None  # launched, and not yet asked for

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See `Runner.run`."""
        try:
            return self._run(chunks)
        except torch.OutOfMemoryError as error:
            self._ahead = None
            raise StepOutOfMemory(str(error)) from error

    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Store keys and values of the chunks; logits of those that sample, in order: (samples, vocab) float32."""
        logits = self._steps.mixed(chunks).logits
        if logits is None:
            raise ValueError("none of the chunks samples")
        return logits

    def compact(self, sequence: Sequence, keep: int) -> None:
        """Never called: `facts.kv_budgets` is false."""
        raise NotImplementedError("KV budgets are the native engine's")

    def forget(self, sequence: Sequence) -> None:
        self._steps.sampler.forget(sequence)

    def _run(self, chunks: list[Chunk]) -> list[Outcome]:
        ahead, self._ahead = self._ahead, None
        found = {} if ahead is None else _matches(ahead, chunks)
        rest = [chunk for number, chunk in enumerate(chunks) if number not in found]
        if ahead is None or not found:
            flight = self._launch(chunks)
            self._ahead = self._launch_next(flight)
            return self._outcomes(chunks, flight)
        behind = self._launch(rest) if rest else None  # before the wait: its launches take longer than a decode step
        if behind is None:
            self._ahead = self._launch_next(ahead)
        drawn = ahead.sampled()
        others = iter(() if behind is None else self._outcomes(rest, behind))
        return [drawn[found[number]] if number in found else next(others) for number in range(len(chunks))]

    def _launch(self, chunks: list[Chunk]) -> Flight:
        if all(chunk.count == 1 and chunk.sample for chunk in chunks):
            return self._steps.decode([Row(chunk.sequence, chunk.start) for chunk in chunks])
        return self._steps.mixed(chunks)

    def _launch_next(self, flight: Flight) -> Flight | None:
        """The step that follows if every sequence of `flight` goes on that can."""
        careful = self._steps.sampler.is_careful
        if any(careful(row.sequence, row.output_index) for row in flight.rows):
            return None
        next_rows = (Row(row.sequence, row.position + 1, draw) for draw, row in enumerate(flight.rows))
        rows = [row for row in next_rows if self._goes_on(row) and not careful(row.sequence, row.output_index)]
        return self._steps.decode(rows) if rows else None

    def _goes_on(self, row: Row) -> bool:
        """Whether the position, whose token is being drawn, has a block, and a token is wanted behind it."""
        sequence = row.sequence
        return (
            row.position // self._facts.block_size < len(sequence.blocks)
            and row.output_index < sequence.request.limits.max_tokens
            and row.position + 1 < self._facts.max_context
        )

    # What a step has to tell

    def _outcomes(self, chunks: list[Chunk], flight: Flight) -> list[Outcome]:
        told = {
            number: self._told(chunk, flight.residual[first : first + chunk.count])
            for number, (chunk, first) in enumerate(zip(chunks, flight.first_rows, strict=False))
            if not chunk.sample and flight.residual is not None
        }
        drawn = iter(flight.sampled())
        return [next(drawn) if chunk.sample else told.get(number) for number, chunk in enumerate(chunks)]

    @torch.inference_mode()
    def _told(self, chunk: Chunk, residual: torch.Tensor) -> Outcome:
        """What a chunk that does not sample has to tell. residual: (count, width), its rows."""
        request, model = chunk.sequence.request, self._steps.model
        if request.score_from is not None:
            first, end = scored_positions(chunk)
            scores = ChunkScores([], [])
            for start in range(first, end, SCORED_AT_ONCE):
                tokens = chunk.sequence.tokens[start : min(start + SCORED_AT_ONCE, end)]
                begin = start - 1 - chunk.start
                logprobs = torch.log_softmax(model.logits(residual[begin : begin + len(tokens)]), -1)
                targets = torch.tensor(tokens, device=logprobs.device).unsqueeze(1)
                scores.logprobs.extend(logprobs.gather(1, targets).squeeze(1).tolist())
                scores.entropies.extend(torch.special.entr(logprobs.exp()).sum(-1).tolist())
            return scores
        if request.pool is not None:
            hidden = model.normed(residual).double()
            return ChunkPool((hidden.sum(0) if request.pool == "mean" else hidden[-1]).tolist())
        return None


def _matches(ahead: Flight, chunks: list[Chunk]) -> dict[int, int]:
    """Which chunks are computed already: the number of a chunk, and of its draw.

    A sequence that was preempted and started again has another block table, and its row ahead is in vain.
    """
    draws = {id(row.sequence): draw for draw, row in enumerate(ahead.rows)}
    found: dict[int, int] = {}
    for number, chunk in enumerate(chunks):
        draw = draws.get(id(chunk.sequence))
        if draw is None or chunk.count != 1 or not chunk.sample:
            continue
        row = ahead.rows[draw]
        if row.position == chunk.start and ahead.tables[draw] is chunk.sequence.blocks:
            found[number] = draw
    return found
