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
    """A request inside the engine. Tokens `[0, computed)` have their keys and values in `blocks`."""

    request: Submit
    tokens: list[int]  # prompt, then output
    blocks: list[int] = field(default_factory=list)  # block table: position p lives in blocks[p // block_size]
    computed: int = 0
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


@dataclass(slots=True, frozen=True)
class Chunk:
    """Work for one sequence in one step: compute tokens `[start, start + count)`.

    `sample` is true where the chunk reaches the last known token, so that the next one is to be drawn.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool


@dataclass(slots=True, frozen=True)
class Sampled:
    token: int
    logprob: float | None = None  # nats; set where the request asked for logprobs
    top: tuple[TokenLogprob, ...] = ()


class StepOutOfMemory(Exception):  # noqa: N818 - named as the condition, like StopIteration
    """The device had no memory for a step; nothing of the step took effect."""


class Runner(Protocol):
    """Runs a model over a ragged batch. The KV cache is the runner's; whose block is whose is the scheduler's."""

    @property
    def facts(self) -> ModelFacts: ...

    def run(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """Store keys and values of every chunk, and draw a token for each chunk whose `sample` is true.

        Returns one entry a chunk, in order; None where `sample` is false.
        Raises StepOutOfMemory.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop per-sequence sampling state (penalty counts). Called once when a sequence ends or is preempted."""
        ...
