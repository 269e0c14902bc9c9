"""What the pipeline knows of a caller's risk while it carries one of its requests."""

from __future__ import annotations

from dataclasses import dataclass

from meshlm.router.risk.standing import Caller, Standing
from meshlm.router.risk.surprise import Surprise


@dataclass
class Assessment:
    """What was thought of one request before it was admitted."""

    caller: Caller
    identifier: str
    shadow: bool
    standing: Standing
    place: str  # where a model's score of its prompt is remembered; empty: no model scores it
    surprise: Surprise | None  # of its prompt: the estimate, or what a model said of it before
    risk: float
    weight: float  # as it would be, were it not for the shadow
    scored: Surprise | None = None  # of its prompt, once a model has read it
    noted: bool = False

    @property
    def in_force(self) -> float:
        """The weight that the ledger counts with."""
        return 1.0 if self.shadow else self.weight

    @property
    def read(self) -> Surprise | None:
        """The best that is known of its prompt by now."""
        return self.scored or self.surprise

    @property
    def record(self) -> dict[str, object]:
        """For the audit line."""
        return {
            "risk": round(self.risk, 3),
            "surprise": round(self.read.nats, 3) if self.read is not None else None,
            "surprise_source": self.read.source if self.read is not None else "",
            "weight": round(self.weight, 3),
            "shadow": self.shadow,
            "breaker": str(self.standing.key),
            "tenant_breaker": str(self.standing.route),
        }

    @property
    def refused(self) -> bool:
        """Whether the key's breaker turned it away."""
        return not self.standing.passes and not self.shadow
