"""One sequence of tokens on its way through the engine, and the seam between scheduler and runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from meshlm.worker.messages import ModelFacts, Submit, TokenLogprob


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside the engine. Tokens `[0, computed)` have their keys and values in `blocks`, less what a KV budget
    took away: cache index i lies in blocks[i // block_size], the next position to compute at index computed - evicted.

    With the policy `window`, the first `sinks` indices are positions [0, sinks) and the others the latest positions.
    With `importance`, what lies at the indices below is up to the runner, and differs between heads.
    """

    request: Submit
    tokens: list[int]  # prompt, then output
    blocks: list[int] = field(default_factory=list)  # block table: cache index i lies in blocks[i // block_size]
    computed: int = 0
    evicted: int = (
        0  # computed tokens no longer in the cache: position p lies at cache index p - evicted, if it still does
    )
    hashes: list[bytes] = field(default_factory=list)  # prefix hash of each full block, see `blocks.py`
    cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    status: Status = Status.WAITING
    preemptions: int = 0
    first_scheduled: float = 0.0
    first_token: float = 0.0

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(slots=True)  # not frozen: one is made for each token, and a frozen one takes three times as long
class Chunk:
    """Work for one sequence in one step: compute tokens `[start, start + count)`.

    `sample` is true where the chunk reaches the last known token, so that the next one is to be drawn.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool


def scored_positions(chunk: Chunk) -> tuple[int, int]:
    """The positions whose tokens are scored with a chunk, from where to where: each is behind one that it computes."""
    end = min(chunk.start + chunk.count + 1, len(chunk.sequence.tokens))
    return min(max(chunk.start + 1, chunk.sequence.request.score_from or 0), end), end


@dataclass(slots=True)
class Sampled:
    token: int
    logprob: float | None = None  # nats; set where the request asked for logprobs
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, frozen=True)
class ChunkScores:
    """Of the chunk's tokens at `score_from` and behind, one after the other; nats."""

    logprobs: list[float]
    entropies: list[float]


@dataclass(slots=True, frozen=True)
class ChunkPool:
    """The sum of the chunk's final hidden states for `mean`, the chunk's last one for `last`: (width,)."""

    vector: list[float]


@dataclass(slots=True, frozen=True)
class NonFinite:
    """Of a chunk that was to sample: its logits have what is no number, or nothing above -inf. There is no distribution
    to draw of: the weights, the device, or what was computed from them, are broken."""


NON_FINITE = NonFinite()
Outcome = Sampled | ChunkScores | ChunkPool | NonFinite | None


class StepOutOfMemory(Exception):  # noqa: N818 - named as the condition, like StopIteration
    """The device had no memory for a step; nothing of the step took effect."""


class Runner(Protocol):
    """Runs a model over a ragged batch. The KV cache is the runner's; whose block is whose is the scheduler's."""

    @property
    def facts(self) -> ModelFacts: ...

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """Store keys and values of every chunk, and draw a token for each chunk whose `sample` is true.

        Returns one entry a chunk, in order; None where there is nothing to tell. A request with `score_from` or `pool`
        gets ChunkScores or ChunkPool for every chunk, and its chunks never sample. The token at position p is scored
        with the chunk that computes position p - 1. A row of logits that is no distribution gives NonFinite, and leaves
        the other chunks as they are; scores and vectors are told as they come.
        Raises StepOutOfMemory.
        """
        ...

    def compact(self, sequence: Sequence, keep: int) -> None:
        """For the policy `importance`: moves the `keep` cached tokens that matter most, the latest 32 among them, to
        the cache indices [0, keep). Called between steps, never before the prompt is computed, with all of
        `sequence.blocks` still in place; the caller then takes the blocks behind away and raises `evicted`. Only where
        `facts.kv_budgets`.

        What matters of a prompt is what its last 32 queries attend to. They come in one chunk, or as many of them as
        the longest chunk has.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop per-sequence sampling state (penalty counts). Called once when a sequence ends or is preempted."""
        ...
