"""What a detector reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something found in a text."""

    # Which rule found it: each counts once in a combined score.
    rule: str
    # What it is, e.g. `injection.override`.
    category: str
    # Confidence. Range [0, 1].
    score: float
    # Character range in the text as it was given: start inclusive, end exclusive.
    start: int
    end: int
