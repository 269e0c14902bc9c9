"""How sure a small model is of its answer, by the log-probabilities of the first tokens that it made.

The least likely tokens decide: most words of an answer are sure because of those before them, whatever they say. The
mean over all tokens, the least alone, their sum and other measures were tried beside it (docs/routing.md has the page).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from meshlm.router.routing.config import ComplexityConfig
from meshlm.router.routing.quantiles import quantile

_LEAST = 3  # tokens that decide
_ROUNDING = 1e-3  # nats by which a certain token's may be above 0


@dataclass(frozen=True)
class Trial:
    """A request that the small model begins: whether it is sure enough decides who answers."""

    place: str  # of its rule
    config: ComplexityConfig
    small: str
    large: str


def doubt_of(logprobs: Sequence[float]) -> float | None:
    """In [0, 1]: one less the geometric mean of the three least probabilities; their natural logarithms are given. 0:
    every token was certain. None without a token, or where one has no log-probability."""
    if not logprobs or any(math.isnan(logprob) or logprob > _ROUNDING for logprob in logprobs):
        return None
    least = sorted(logprobs)[:_LEAST]
    return min(1.0, max(0.0, 1.0 - math.exp(sum(least) / len(least))))


@dataclass(frozen=True)
class Doubts:
    """How much a small model doubted its answers to questions: `quantiles`, evenly spaced, from the least doubt on."""

    version: str
    quantiles: tuple[float, ...]

    def threshold(self, share: float) -> float:
        """The doubt that `share` of these answers do not pass."""
        return quantile(self.quantiles, share)


def load() -> Doubts:
    """Those that the router ships."""
    text = resources.files("meshlm.router.routing").joinpath("confidence.json").read_text("utf-8")
    found = json.loads(text)
    return Doubts(found["version"], tuple(map(float, found["quantiles"])))
