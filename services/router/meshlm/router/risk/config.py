"""Configuration of what callers' risk does: `router.risk`, `router.entropy` and `router.breakers`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What is done with a caller's risk: it throttles and shuts; it is told, and nothing follows; it is not looked at.
RiskMode = Literal["enforce", "shadow", "off"]


@dataclass(frozen=True)
class RiskConfig:
    """What follows from a caller's risk (docs/risk.md)."""

    # `enforce`: risk throttles, breakers open; `shadow`: what would have happened is told, and nothing follows; `off`:
    # callers have no risk.
    mode: RiskMode = "enforce"
    # Seconds in which a caller's risk halves.
    half_life_seconds: float = 600.0
    # Score of the guard from which an input that it flags counts as an attack for the breakers. Range [0, 1].
    flag_score: float = 0.5

    def __post_init__(self) -> None:
        if self.half_life_seconds <= 0:
            raise ValueError("half_life_seconds must be above 0")
        if not 0 <= self.flag_score <= 1:
            raise ValueError("flag_score must be in [0, 1]")


@dataclass(frozen=True)
class RampConfig:
    """How surprise becomes risk: none up to `calm`, all there is from `alarm` on."""

    # Nats a token (a byte, for the n-gram estimate).
    calm: float
    # Same unit, above `calm`.
    alarm: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.calm) and math.isfinite(self.alarm) and self.calm < self.alarm):
            raise ValueError("expected calm < alarm")


@dataclass(frozen=True)
class EntropyConfig:
    """How surprising a prompt is, and what reads it."""

    # Model that scores prompts beside their prefill, one of those that `router.workers` serve; empty: none, and the
    # n-gram estimate alone counts.
    model: str = ""
    # Tokens that the model reads of a prompt's beginning, and of its end; what is between them is not looked at.
    tokens: int = 512
    # Seconds a score may take.
    seconds: float = 10.0
    # Prompts that one router has scored at a time; those beyond them get the estimate alone.
    in_flight: int = 4
    # Seconds a prompt's score is remembered.
    cache_seconds: float = 3600.0
    # Ramps by the scoring model's revision, where they differ from the built-in ones; `ngram` is the estimate's.
    ramps: Mapping[str, RampConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds", "in_flight", "cache_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")


@dataclass(frozen=True)
class BreakerConfig:
    """When bursts of attacks open a breaker, and for how long."""

    # Seconds a breaker is open the first time; twice as long each time that it opens again at once.
    open_seconds: float = 60.0
    # Most seconds it is open; by chance up to a fifth more or less.
    longest_seconds: float = 900.0
    # Share of flagged requests that is ordinary of anyone. Range (0, 1].
    baseline: float = 0.02
    # The most that may become ordinary of a caller whose requests are often flagged. Range [baseline, 1].
    highest_baseline: float = 0.05
    # Guard policy of a tenant's requests while its breaker is open; empty: each key's own.
    strict_policy: str = ""
    # Seconds after which a probe that never ended makes room for another.
    probe_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.open_seconds <= self.longest_seconds:
            raise ValueError("expected 0 < open_seconds <= longest_seconds")
        if not 0 < self.baseline <= self.highest_baseline <= 1:
            raise ValueError("expected 0 < baseline <= highest_baseline <= 1")
        if self.probe_seconds <= 0:
            raise ValueError("probe_seconds must be above 0")
