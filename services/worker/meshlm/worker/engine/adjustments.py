"""What comes before temperature and the native draw: minimum length, bias, penalties and log-probabilities, in numpy.

`Sampler.prepare` (`sampler.py`) is the same in torch, which an engine that computes natively does not load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from meshlm.worker.engine.draws import penalized
from meshlm.worker.engine.sequence import Sampled, Sequence
from meshlm.worker.messages import TokenLogprob

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Counts:
    """What a sequence has said so far: `seen` (vocab,) bool of prompt and output, `output` (vocab,) counts."""

    seen: npt.NDArray[np.bool_]
    output: Floats
    length: int = 0

    def catch_up(self, sequence: Sequence) -> None:
        # May be empty: a step that ran out of memory after its penalties is tried again.
        fresh = np.array(sequence.tokens[self.length :], np.int64)
        self.seen[fresh] = True
        np.add.at(self.output, fresh[max(0, sequence.prompt_length - self.length) :], np.float32(1))
        self.length = len(sequence.tokens)


class Adjustments:
    """Prepares the logits of a step. Keeps penalty counts by sequence until `forget`."""

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}

    def forget(self, sequence: Sequence) -> None:
        self._counts.pop(id(sequence), None)

    def prepare(self, logits: Floats, sequences: list[Sequence]) -> dict[int, Report]:
        """In place on logits: (len(sequences), vocab). Returns by row the log-probabilities of the model's own
        distribution, where a request wants them."""
        reports = {
            row: Report(logits[row], sequence.request.sampling.logprobs)
            for row, sequence in enumerate(sequences)
            if sequence.request.sampling.logprobs is not None
        }
        for row, sequence in enumerate(sequences):
            self._adjust(logits[row], sequence)
        return reports

    def _adjust(self, row: Floats, sequence: Sequence) -> None:
        """row: (vocab,), overwritten."""
        sampling, limits = sequence.request.sampling, sequence.request.limits
        if sequence.output_length < limits.min_tokens and limits.stop_token_ids:
            row[list(limits.stop_token_ids)] = -np.inf
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += np.array(list(sampling.logit_bias.values()), np.float32)
        if not penalized(sampling):
            return
        counts = self._counts.get(id(sequence))
        if counts is None:
            counts = self._counts[id(sequence)] = _Counts(np.zeros(len(row), np.bool_), np.zeros_like(row))
        counts.catch_up(sequence)
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            with np.errstate(over="ignore"):  # a tiny penalty makes infinities, which the draw knows
                scaled = np.where(row > 0, row / penalty, row * penalty)
            row[counts.seen] = scaled[counts.seen]
        row -= np.float32(sampling.frequency_penalty) * counts.output
        row -= np.float32(sampling.presence_penalty) * np.minimum(counts.output, 1)


class Report:
    """Log-probabilities of one row as the model gave them, kept before the row is overwritten."""

    def __init__(self, row: Floats, count: int | None) -> None:
        """row: (vocab,). count: how many of the greatest are told."""
        with np.errstate(invalid="ignore"):  # of a row that is no distribution nothing is told
            shifted = row - row.max()
            self._logprobs: Floats = shifted - np.log(np.exp(shifted).sum(dtype=np.float64)).astype(np.float32)
        self._count = min(count or 0, len(row))

    def sampled(self, token: int) -> Sampled:
        """See `draws.Report`."""
        logprobs, count = self._logprobs, self._count
        ids = np.argpartition(logprobs, len(logprobs) - count)[len(logprobs) - count :] if count else np.array([], int)
        ids = ids[np.lexsort((ids, -logprobs[ids]))]
        top = tuple(TokenLogprob(int(i), float(logprobs[i])) for i in ids)
        return Sampled(token, float(logprobs[token]), top)
