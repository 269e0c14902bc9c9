"""What a request weighs for its limits, by the risk in it."""

from __future__ import annotations

# A weight is 1 + THROTTLE x risk squared.
THROTTLE = 7.0
MOST = 1.0 + THROTTLE


def weight_of(risk: float) -> float:
    """How many times tokens and places of a request count."""
    return 1.0 + THROTTLE * risk * risk
