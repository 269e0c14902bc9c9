"""Proof of execution (section `router.proof`), see docs/proof.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProofConfig:
    """How often answers are computed again elsewhere, and what follows where they differ."""

    # Share of answers whose log-probabilities another worker computes again; nothing where there is no other. Range
    # [0, 1].
    share: float = 0.01
    # Largest mean difference of the log-probabilities of an answer's tokens, nats, that two honest workers of the same
    # weights, formats and engine have.
    bound: float = 0.05
    # Answers shorter than this prove nothing, tokens.
    least_tokens: int = 8
    # Longest text, prompt and answer, that is computed again, tokens.
    most_tokens: int = 16_384
    # Answers proven at a time; what comes meanwhile is not.
    concurrency: int = 2
    # Seconds a worker may take to compute one again.
    seconds: float = 30.0
    # Seconds for which a worker that was proven wrong gets no requests, from any router; 0: it is only told.
    quarantine_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("share must be in [0, 1]")
        if self.bound <= 0 or self.seconds <= 0:
            raise ValueError("bound and seconds must be above 0")
        if self.least_tokens < 1 or self.most_tokens < self.least_tokens or self.concurrency < 1:
            raise ValueError("least_tokens and concurrency must be at least 1, and most_tokens at least least_tokens")
        if self.quarantine_seconds < 0:
            raise ValueError("quarantine_seconds must be at least 0")
