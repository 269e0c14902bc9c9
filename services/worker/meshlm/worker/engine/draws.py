"""What every draw has, in torch and natively: a uniform number for each token, and the draw's outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from meshlm.kernels.native.structures import NO_TOKEN
from meshlm.worker.engine.sequence import NON_FINITE, NonFinite, Sampled, Sequence
from meshlm.worker.messages import Sampling

_MASK64 = (1 << 64) - 1


class Report(Protocol):
    """Log-probabilities of one row as the model gave them."""

    def sampled(self, token: int) -> Sampled:
        """The token that was drawn, with its log-probability and the greatest ones that the request wants."""
        ...


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from two integers: two rounds of SplitMix64's finalizer (Steele et al. 2014)."""
    return (_mix(_mix(seed & _MASK64) ^ (index & _MASK64)) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def told(tokens: list[int], reports: Mapping[int, Report]) -> list[Sampled | NonFinite]:
    """Drawn tokens as outcomes, each with its row's report where there is one."""
    return [
        NON_FINITE if token == NO_TOKEN else reports[row].sampled(token) if row in reports else Sampled(token)
        for row, token in enumerate(tokens)
    ]


def penalized(sampling: Sampling) -> bool:
    """Whether logits depend on what a sequence has said."""
    return sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)


def adjusts(sequence: Sequence) -> bool:
    """Whether something comes before temperature and draw of a sequence's next token, or is to be told of it."""
    sampling, limits = sequence.request.sampling, sequence.request.limits
    return bool(
        sampling.logprobs is not None
        or sampling.logit_bias
        or penalized(sampling)
        or sequence.output_length < limits.min_tokens
    )
