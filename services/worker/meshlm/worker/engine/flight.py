"""A step that was launched on a device, and the tokens that will arrive from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from meshlm.kernels.sample import NO_TOKEN
from meshlm.worker.engine.sequence import NON_FINITE, NonFinite, Sampled, Sequence
from meshlm.worker.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class Row:
    """A position to compute, behind which a token is drawn.

    The token at the position is the sequence's, or, where `source` is not below 0, the one that the step before drew
    under this number.
    """

    sequence: Sequence
    position: int
    source: int = -1

    @property
    def output_index(self) -> int:
        """Of the token to draw: how many of the answer come before it."""
        return self.position + 1 - self.sequence.prompt_length


class Reply:
    """Where the tokens of a step arrive on the host."""

    def __init__(self, most: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._tokens = torch.zeros(most, dtype=torch.int32, pin_memory=pinned)
        self._logprobs = torch.zeros(most, dtype=torch.float32, pin_memory=pinned)
        self._arrived = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def fetch(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Starts the copy of (draws,) tokens and their log-probabilities."""
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._logprobs[: len(logprobs)].copy_(logprobs, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self, draws: int) -> tuple[list[int], list[float]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tokens[:draws].tolist(), self._logprobs[:draws].tolist()


@dataclass(slots=True)
class Flight:
    """A launched step. `rows` are those that are drawn of, by the number of their draw."""

    rows: list[Row]
    reply: Reply
    tables: list[list[int]]  # of the rows: the very lists, which a sequence that is preempted gives up
    tops: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)  # by draw, where asked for
    logits: torch.Tensor | None = None  # (draws, vocab) float32, of a mixed step
    residual: torch.Tensor | None = None  # (rows, width), of a mixed step
    first_rows: list[int] = field(default_factory=list)  # of each chunk of a mixed step

    def sampled(self) -> list[Sampled | NonFinite]:
        """Waits for the tokens."""
        tokens, logprobs = self.reply.wait(len(self.rows))
        return [
            NON_FINITE
            if token == NO_TOKEN
            else Sampled(token)
            if row.sequence.request.sampling.logprobs is None
            else Sampled(token, logprob, self.tops.get(draw, ()))
            for draw, (row, token, logprob) in enumerate(zip(self.rows, tokens, logprobs, strict=True))
        ]
