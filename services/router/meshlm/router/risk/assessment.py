"""What the pipeline knows of a caller's risk while it carries one of its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from meshlm.router.risk.breaker import State
from meshlm.router.risk.config import RampConfig
from meshlm.router.risk.standing import Caller, Standing
from meshlm.router.risk.surprise import Surprise, risk_of
from meshlm.router.risk.weight import MOST, weight_of


@dataclass
class Assessment:
    """What is thought of one request. Its prompt is read when somebody first asks for what follows from that: where
    no limit counts with its weight, once its call has gone out."""

    caller: Caller
    identifier: str
    shadow: bool
    standing: Standing
    place: str  # where a model's score of its prompt is remembered; empty: no model scores it
    ramps: Mapping[str, RampConfig]
    reading: Callable[[], Surprise | None] | None  # of its prompt; None once it is read
    _surprise: Surprise | None = field(default=None, init=False)
    scored: Surprise | None = None  # of its prompt, once a model has read it
    noted: bool = False

    @property
    def surprise(self) -> Surprise | None:
        """Of its prompt: the estimate, or what a model said of it before."""
        if self.reading is not None:
            reading, self.reading = self.reading, None
            self._surprise = reading()
        return self._surprise

    @property
    def of_prompt(self) -> float:
        """The risk in that."""
        return risk_of(self.surprise, self.ramps)

    @property
    def risk(self) -> float:
        """The caller's, or its prompt's."""
        return max(self.standing.risk, self.of_prompt)

    @property
    def weight(self) -> float:
        """As it would be, were it not for the shadow."""
        return MOST if self.standing.route is not State.CLOSED else weight_of(self.risk)

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
