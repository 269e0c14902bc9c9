"""Steps of every kind that serving has, run before it serves: Triton compiles a kernel when it is first launched with
arguments of a kind, for a second or more, and every stream waits.

What is compiled anew follows from numbers of rows (tiles, and whether a product's columns are split), from the room in
block tables (whether contexts are split), and from how tokens are drawn.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from triton import knobs

from meshlm.worker.engine.gpu_runner import SCORED_AT_ONCE
from meshlm.worker.engine.gpu_sampler import BIAS_WIDTHS
from meshlm.worker.engine.gpu_steps import GpuSteps
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.messages import Limits, ModelFacts, Sampling, Submit

TALL_ROWS = 64  # the least height of a tile where a product has many rows

log = structlog.get_logger()


def warm_up(steps: GpuSteps, facts: ModelFacts, step_tokens: int) -> None:
    """Runs prompts of all sizes, behind short and long contexts, with and without decoding rows beside them, and draws
    of all kinds. What they write lies in block 0."""
    longest, most = facts.max_context, steps.max_running
    for rows in row_counts(step_tokens):
        sequences = min(most, -(-rows // longest))
        _run(steps, [chunk_of(facts, 0, count) for count in spread(rows, sequences, longest)])
    for rows in row_counts(min(step_tokens, longest)):
        if rows <= TALL_ROWS or rows.bit_count() == 1:
            _run(steps, [chunk_of(facts, longest - rows, rows)])
    _score(steps, [chunk_of(facts, 0, min(SCORED_AT_ONCE, longest))])
    for start in (0, longest - 1):
        _run(steps, [chunk_of(facts, start, 1)] * min(most, 2))
    for sequences in {1, min(most, 4)}:
        for width in BIAS_WIDTHS:
            sampling = Sampling(presence_penalty=0.5, logit_bias=dict.fromkeys(range(width), 0.0))
            # One token of the prompt and one of the answer: they are counted apart.
            chunks = [chunk_of(facts, 1, 1, sampling, answered=1) for _ in range(sequences)]
            _run(steps, chunks)
            for chunk in chunks:
                steps.sampler.forget(chunk.sequence)


def watch_for_compilation() -> None:
    """Logs what is compiled from now on: a stall that `warm_up` should have foreseen."""

    def note(**compiled: Any) -> None:
        log.warning("a kernel was compiled while serving", kernel=compiled["fn"].name)

    knobs.runtime.jit_post_compile_hook = note


def row_counts(step_tokens: int) -> list[int]:
    """Of steps with prompts: powers of two up to TALL_ROWS and one less, where tiles of attention change on one device
    or another, then its multiples, and the most."""
    powers = (2, 4, 8, 16, 32, TALL_ROWS)
    counts = {*powers, *(power - 1 for power in powers[1:]), *range(TALL_ROWS, step_tokens, TALL_ROWS)}
    return sorted({count for count in counts if count < step_tokens} | {step_tokens})


def spread(rows: int, sequences: int, longest: int) -> list[int]:
    """How many rows each of so many sequences has: at least 1, and at most `longest`, the first as many as they may."""
    counts, left = [], rows
    for others in reversed(range(sequences)):
        counts.append(min(longest, left - others))
        left -= counts[-1]
    return counts


def chunk_of(
    facts: ModelFacts, start: int, count: int, sampling: Sampling | None = None, *, answered: int = 0
) -> Chunk:
    """Of a sequence of its own, whose every block is block 0, and which draws a token. answered: of its tokens, the
    last that are no prompt."""
    end = start + count
    prompt = [0] * (end - answered)
    request = Submit(
        id=f"{start} to {end}", prompt=prompt, sampling=sampling or Sampling(), limits=Limits(max_tokens=1)
    )
    return Chunk(Sequence(request, [0] * end, [0] * -(-end // facts.block_size)), start, count, True)


def _run(steps: GpuSteps, chunks: list[Chunk]) -> None:
    steps.mixed(chunks).sampled()


@torch.inference_mode()
def _score(steps: GpuSteps, chunks: list[Chunk]) -> None:
    """The head over rows that are not drawn of, for it may be quantized in a way of its own."""
    residual = steps.mixed(chunks).residual
    for rows in row_counts(SCORED_AT_ONCE):
        if residual is not None:
            steps.model.logits(residual[:rows])
